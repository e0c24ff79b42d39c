"""The oracle: whose attention chooses, what becomes of it at later stages, and what it leaves alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from slow_oracle import attention_maps, slow_guided
from torch.utils.checkpoint import checkpoint

import evit_ext

pytestmark = pytest.mark.usefixtures("one_thread")

DROP_LOC = (0, 1, 3)


def images(batch: int = 3, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, 32, 32, dtype=dtype, generator=generator)


def other(small_vit: Any, **arguments: Any) -> Any:
    """A ViT whose attention differs from that of small_vit's: its weights are redrawn."""
    vit = small_vit(dtype=torch.float64, **arguments)
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, dtype=torch.float64, generator=generator))
    return vit


def test_scores_are_the_class_tokens_of_all_patches(small_vit: Any, device: torch.device) -> None:
    vit, x = other(small_vit), images()
    maps = attention_maps(vit, x)
    oracle = evit_ext.Oracle(vit, DROP_LOC).to(device)
    scores = oracle(x.to(device))
    for number, score in zip(DROP_LOC, scores, strict=True):
        expected = maps[number][:, :, 0, 1:].mean(dim=1)
        torch.testing.assert_close(score.cpu(), expected, rtol=1e-12, atol=1e-14)
        assert not score.requires_grad


@pytest.mark.parametrize("fuse", [True, False])
def test_agrees_with_the_slow_implementation(small_vit: Any, fuse: bool, device: torch.device) -> None:
    rates = (0.7, 0.6, 0.5)
    plain, oracle_vit = small_vit(dtype=torch.float64), other(small_vit)
    expected, expected_kept = slow_guided(plain, oracle_vit, images(), rates, DROP_LOC, fuse)
    student = evit_ext.apply(copy.deepcopy(plain).to(device), rates, DROP_LOC, fuse)
    oracle = evit_ext.Oracle(oracle_vit, DROP_LOC).to(device)
    x = images().to(device)
    with oracle.guide(student), evit_ext.record_tokens(student) as record:
        logits = student(x)
    assert [[record.kept[stage][b].tolist() for stage in range(3)] for b in range(len(x))] == expected_kept
    torch.testing.assert_close(logits.cpu(), expected, rtol=1e-10, atol=1e-11)
    weights = torch.randn(expected.shape, dtype=torch.float64)
    (expected * weights).sum().backward()
    (logits.cpu() * weights).sum().backward()
    for (name, parameter), slow in zip(student.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad.cpu(), slow.grad, rtol=1e-9, atol=1e-11, msg=name)
    assert all(parameter.grad is None for parameter in oracle.parameters())
    # Its own attention would have chosen otherwise, and does after the context.
    with evit_ext.record_tokens(student) as own:
        student(x)
    assert not torch.equal(own.kept[0], record.kept[0])


def test_a_fused_token_has_the_mean_of_its_patches(small_vit: Any, device: torch.device) -> None:
    student = evit_ext.apply(small_vit(dtype=torch.float64).to(device), 0.5, DROP_LOC)
    oracle = evit_ext.Oracle(other(small_vit), DROP_LOC).to(device)
    x = images().to(device)
    scores = oracle(x)
    with oracle.guide(student), evit_ext.record_tokens(student) as record:
        student(x)
    for b in range(len(x)):
        dropped = sorted(set(range(16)) - set(record.kept[0][b].tolist()))
        mean = sum(scores[1][b, patch] for patch in dropped) / len(dropped)
        torch.testing.assert_close(record.scores[1][b, -1], mean, rtol=1e-14, atol=0)


def test_the_oracle_is_a_frozen_copy(small_vit: Any) -> None:
    vit = small_vit(drop_path_rate=0.5, attn_drop_rate=0.5).train()
    oracle = evit_ext.Oracle(vit).train()
    assert not any(module.training for module in oracle.modules())
    assert not any(parameter.requires_grad for parameter in oracle.parameters())
    assert vit.training and all(parameter.requires_grad for parameter in vit.parameters())
    expected = oracle(images(dtype=torch.float32))
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.zero_()
    for a, b in zip(oracle(images(dtype=torch.float32)), expected, strict=True):
        assert torch.equal(a, b)


def test_initialize(small_vit: Any) -> None:
    vit = other(small_vit)
    oracle = evit_ext.Oracle(vit)
    student = evit_ext.apply(small_vit(dtype=torch.float64))
    oracle.initialize(student)
    for (name, a), b in zip(student.named_parameters(), vit.parameters(), strict=True):
        assert torch.equal(a, b), name
    unlike = evit_ext.apply(small_vit(num_classes=7, dtype=torch.float64))
    expected = {name: value.clone() for name, value in unlike.state_dict().items()}
    message = r"head.weight: \(5, 24\) in the oracle, \(7, 24\) in the student"
    with pytest.raises(ValueError, match=message):
        oracle.initialize(unlike)
    for name, value in unlike.state_dict().items():
        assert torch.equal(value, expected[name])


def test_at_keep_rate_one_nothing_changes(small_vit: Any) -> None:
    vit, x = small_vit(), images(dtype=torch.float32)
    expected = vit(x)
    evit_ext.apply(vit, 1.0)
    with evit_ext.Oracle(small_vit()).guide(vit):
        assert torch.equal(vit(x), expected)


def test_gradient_checkpointing(small_vit: Any) -> None:
    student = evit_ext.apply(small_vit(dtype=torch.float64), 0.6, DROP_LOC).train()
    x = images()
    with evit_ext.Oracle(other(small_vit), DROP_LOC).guide(student):
        student(x).square().sum().backward()
        expected = [parameter.grad.clone() for parameter in student.parameters()]
        student.zero_grad()
        student.set_grad_checkpointing()
        student(x).square().sum().backward()
        for parameter, gradient in zip(student.parameters(), expected, strict=True):
            torch.testing.assert_close(parameter.grad, gradient)
        first, _ = student(x), student(images(seed=1))
        with pytest.raises(RuntimeError, match="every forward needs its backward before the next forward"):
            first.sum().backward()


def test_inside_of_a_checkpoint(small_vit: Any) -> None:
    student = evit_ext.apply(small_vit(dtype=torch.float64), 0.6, DROP_LOC).train()
    gradients = []
    with evit_ext.Oracle(other(small_vit), DROP_LOC).guide(student):
        for checkpointing in (False, True):
            student.zero_grad()
            x = images()
            out = checkpoint(student, x, use_reentrant=False) if checkpointing else student(x)
            out.square().sum().backward()
            gradients.append([p.grad.clone() for p in student.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_what_the_oracle_said_of_other_images_is_not_used(small_vit: Any) -> None:
    student = evit_ext.apply(small_vit(), 0.6)
    x = images(dtype=torch.float32)
    with evit_ext.Oracle(small_vit()).guide(student):
        student(x)
        for call in (student.forward_features, student.forward_intermediates):
            with pytest.raises(ValueError, match="the oracle was not asked: call the whole model"):
                call(x)
        with pytest.raises(ValueError, match="called without images"):
            student("images")


def test_another_dtype_is_named(small_vit: Any) -> None:
    with pytest.raises(ValueError, match=r"the oracle is torch.float32, the images are torch.float64"):
        evit_ext.Oracle(small_vit())(images())


def test_compile(small_vit: Any) -> None:
    student = evit_ext.apply(small_vit(dtype=torch.float64), 0.6, DROP_LOC)
    x = images()
    torch.compiler.reset()
    with evit_ext.Oracle(other(small_vit), DROP_LOC).guide(student):
        compiled = torch.compile(student, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), student(x))


def test_other_families(small_vit: Any) -> None:
    """An oracle without a class token, and a student on which it does not depend of what kind it is."""
    oracle = evit_ext.Oracle(small_vit(class_token=False, global_pool="avg"))
    student = evit_ext.apply(small_vit(reg_tokens=2), 0.6)
    with oracle.guide(student), evit_ext.record_tokens(student) as record:
        student(images(dtype=torch.float32))
    assert torch.equal(record.scores[0], oracle(images(dtype=torch.float32))[0])


def test_a_copy_is_not_guided(small_vit: Any) -> None:
    student = evit_ext.apply(small_vit(), 0.6)
    with evit_ext.Oracle(small_vit()).guide(student):
        copied = copy.deepcopy(student)
    assert all(block.guidance is None for block in copied.blocks[1:])


def test_errors(small_vit: Any) -> None:
    oracle = evit_ext.Oracle(small_vit())
    message = "no block that reorganises tokens: call evit_ext.apply first"
    with pytest.raises(ValueError, match=message), oracle.guide(small_vit()):
        pass
    student = evit_ext.apply(small_vit(), 0.6, [1, 3])
    message = "the oracle has 3 stages, the student 2: give Oracle a drop_loc"
    with pytest.raises(ValueError, match=message), oracle.guide(student):
        pass
    student = evit_ext.apply(small_vit(), 0.6)
    with oracle.guide(student):
        with pytest.raises(ValueError, match="guided by an oracle already"), oracle.guide(student):
            pass
        with pytest.raises(ValueError, match="the oracle was not asked"):
            student.blocks[1](torch.randn(1, 17, 24))
    finer = evit_ext.apply(small_vit(patch_size=4), 0.6)
    with (
        oracle.guide(finer),
        pytest.raises(ValueError, match=r"the oracle sees \(1, 16\) patches \[B, N\], the student \(1, 64\)"),
    ):
        finer(images(1, torch.float32))
    assert not student._forward_pre_hooks and not finer._forward_pre_hooks
