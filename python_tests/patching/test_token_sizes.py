"""The sizes of tokens on their way through a model, whatever runs its blocks."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import timm
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import evit_ext
from evit_ext.models import lvvit_tiny
from evit_ext.patching.families import vision_transformer
from evit_ext.tokens import EViT, ToMe

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def vit(small_vit: Any) -> Any:
    """A model with blocks before, between and after those that merge, on whose logits the sizes tell."""
    return evit_ext.apply(small_vit(depth=6, dtype=torch.float64), rule=ToMe(r=5), drop_loc=[1, 3])


def images(seed: int = 0, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, 32, 32, generator=generator, dtype=torch.float64)


def gradients(vit: Any, *losses: Tensor) -> list[Tensor]:
    parameters = [p for p in vit.parameters() if p.requires_grad]
    return list(torch.autograd.grad(torch.stack(losses).sum(), parameters, allow_unused=True))


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_sizes_tell(vit: Any) -> None:
    with_sizes = vit(images())
    evit_ext.remove(vit)
    evit_ext.apply(vit, rule=ToMe(r=5, proportional=False), drop_loc=[1, 3])
    assert (vit(images()) - with_sizes).abs().max() > 1e-3


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_after_other_forwards(vit: Any, reentrant: bool) -> None:
    vit.train()
    expected = gradients(vit, *(vit(images(seed)).square().sum() for seed in (0, 1, 2)))

    def run(x: Tensor) -> Tensor:
        x = vit._pos_embed(vit.patch_embed(x))
        for block in vit.blocks:
            x = checkpoint(block, x, use_reentrant=reentrant)
        return vit.forward_head(vit.norm(x))

    losses = [run(images(seed)).square().sum() for seed in (0, 1, 2)]
    with torch.no_grad():
        vit(images(7, batch=3))
    if reentrant:  # which knows no torch.autograd.grad
        torch.stack(losses).sum().backward()
        assert_same([p.grad for p in vit.parameters()], expected)  # type: ignore[misc]
    else:
        assert_same(gradients(vit, *losses), expected)


def test_a_checkpoint_around_the_whole_model(vit: Any) -> None:
    vit.train()
    expected = gradients(vit, vit(images()).square().sum(), vit(images(1)).square().sum())
    losses = [checkpoint(vit, images(seed), use_reentrant=False).square().sum() for seed in (0, 1)]
    assert_same(gradients(vit, *losses), expected)


def test_timm_s_checkpointing_and_lv_vit() -> None:
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "num_heads": 2, "depth": 4, "stem_dim": 8}
    vit = evit_ext.remove(lvvit_tiny(num_classes=5, mix_token=False, **sizes)).double()
    evit_ext.apply(vit, rule=ToMe(r=4), drop_loc=[0, 2]).eval()
    expected = gradients(vit, vit(images()).square().sum())
    vit.set_grad_checkpointing(True)
    assert_same(gradients(vit, vit(images()).square().sum()), expected)


def test_a_recomputed_block_whose_input_was_replaced(vit: Any) -> None:
    vit.train().set_grad_checkpointing(True)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.clone(), lambda x: x):
        loss = vit(images()).sum()
        with pytest.raises(RuntimeError, match="runs a block again on tokens whose sizes are not known"):
            loss.backward()


def test_threads(vit: Any) -> None:
    with torch.no_grad():
        expected = [vit(images(seed)) for seed in range(4)]

        def run(seed: int) -> bool:
            with torch.no_grad():
                return all(torch.equal(vit(images(seed)), expected[seed]) for _ in range(40))

        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(run, range(4)))


def test_copies_and_saved_models_have_their_own(vit: Any) -> None:
    expected = vit(images())
    for other in (copy.deepcopy(vit), pickle.loads(pickle.dumps(vit))):
        carriers = {id(block.token_sizes) for block in other.blocks[1:]}
        assert len(carriers) == 1 and id(vit.blocks[1].token_sizes) not in carriers
        assert torch.equal(other(images()), expected)


def test_a_part_of_the_model_on_other_images(vit: Any) -> None:
    vit(images())
    with pytest.raises(RuntimeError, match="got 3 images, whose tokens' sizes are not known"):
        vit.blocks[5](torch.randn(3, 7, 24, dtype=torch.float64))


def test_nothing_is_carried_from_one_forward_to_the_next(vit: Any) -> None:
    rules = [stage.rule for stage in vit.blocks if hasattr(stage, "rule")]
    expected = vit(images())
    vit.blocks[1].rule = vit.blocks[3].rule = ToMe(r=0)
    unchanged = vit(images())
    vit.blocks[1].rule, vit.blocks[3].rule = rules
    assert torch.equal(vit(images()), expected)
    assert torch.equal(evit_ext.remove(vit)(images()), unchanged)


@pytest.mark.parametrize("gradient", [False, True], ids=["inference", "gradient"])
def test_compiled(vit: Any, gradient: bool) -> None:
    other = copy.deepcopy(vit)
    compiled = torch.compile(vit, backend="aot_eager", fullgraph=True)
    with torch.set_grad_enabled(gradient):
        found, expected = compiled(images()), other(images())
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        if gradient:
            assert_same(gradients(vit, found.square().sum()), gradients(other, expected.square().sum()))
    # The graph leaves nothing behind.
    carrier = vit.blocks[1].token_sizes
    assert carrier._last == (None, None) and not carrier._is_of_graph


@pytest.mark.parametrize("which", [range(6), [1], [2, 4], [0, 1, 3]], ids=str)
def test_blocks_compiled_one_by_one(vit: Any, which: Any) -> None:
    torch.compiler.reset()
    with torch.no_grad():
        expected = [vit(images(seed)) for seed in (0, 1)]
        for number in which:
            vit.blocks[number].compile(backend="aot_eager", fullgraph=True)
        for seed in (0, 1, 0):
            torch.testing.assert_close(vit(images(seed)), expected[seed], rtol=1e-12, atol=1e-12)


def test_attention_with_hooks_and_without_the_kernel(vit: Any) -> None:
    expected = vit(images())
    seen = []
    for block in vit.blocks:
        block.attn.register_forward_hook(lambda module, args, out: seen.append(out.shape[1]))
    torch.testing.assert_close(vit(images()), expected, rtol=1e-12, atol=1e-12)
    assert seen == [17, 17, 12, 12, 7, 7]
    for block in vit.blocks:
        block.attn.fused_attn = False
    torch.testing.assert_close(vit(images()), expected, rtol=1e-12, atol=1e-12)


def test_cpu_forwards_agree_with_timm_s(small_vit: Any) -> None:
    with torch.no_grad():
        vit = evit_ext.apply(small_vit(depth=4), rule=ToMe(r=5), drop_loc=[0, 1]).eval()
        x = images().float()
        expected = copy.deepcopy(vit).double()(x.double())
        torch.testing.assert_close(vit(x).double(), expected, rtol=1e-5, atol=1e-5)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.testing.assert_close(vit(x).double(), expected, rtol=0.1, atol=0.1)


def test_ranking_after_merging_without_a_class_token() -> None:
    """The mean attention with a bias: the scores are those of a map with it."""
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "num_heads": 2, "depth": 3}
    vit = timm.create_model("vit_base_patch16_siglip_gap_224", **sizes).double().eval()
    evit_ext.apply(vit, rule=[ToMe(r=5), EViT(0.5)], drop_loc=[0, 1])
    seen = {}
    vit.blocks[1].attn.register_forward_pre_hook(lambda module, args: seen.update(x=args[0]))
    with evit_ext.record_tokens(vit) as record:
        vit(images())
    attention, x = vit.blocks[1].attn, seen["x"]
    q, k, _ = attention.qkv(x).unflatten(2, (3, 2, 12)).permute(2, 0, 3, 1, 4)
    counts = torch.zeros(2, 11, dtype=torch.float64)
    counts.scatter_add_(1, record.trail.plan(0).owner, torch.ones(2, 16, dtype=torch.float64))
    weights = (q @ k.transpose(2, 3) * 12**-0.5 + counts.log()[:, None, None]).softmax(dim=-1)
    scores = record.trail.plan(1).scores
    torch.testing.assert_close(scores, weights.mean(dim=(1, 2)), rtol=1e-12, atol=1e-14)


def test_a_timm_whose_blocks_take_no_bias(vit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vision_transformer, "_TAKES_BIAS", False)
    with pytest.raises(RuntimeError, match="needs timm 1.0.20 or newer, got .*proportional=False"):
        vit(images())
