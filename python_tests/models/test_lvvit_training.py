"""LV-ViT in training mode: its heads and MixToken, against a slow one."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from slow_evit import slow_lvvit
from small_lvvit import images, micro

import evit_ext
from evit_ext.models import lvvit_model
from evit_ext.models.lvvit import TokenLabelOutput, draw_exchanged

pytestmark = pytest.mark.usefixtures("one_thread")


def by_patch(aux_logits: torch.Tensor, patches: torch.Tensor, total: int = 16) -> torch.Tensor:
    """Return the logits [B, total, classes] of each patch, zero for those that are not left."""
    table = aux_logits.new_zeros(len(patches), total + 1, aux_logits.shape[2])
    index = patches.where(patches >= 0, total).unsqueeze(2).expand_as(aux_logits)
    return table.scatter(1, index, aux_logits)[:, :total]


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("rates", [(0.2, 0.9, 0.6), (0.7, 0.7, 0.7), (1.0, 1.0, 1.0)])
def test_training_output(
    rates: tuple[float, ...],
    dynamic: bool,
    gradients: bool,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Batch statistics, MixToken in a box, and for each token of a patch what the slow one says of it."""
    box = torch.zeros(4, 6, dtype=torch.bool)
    box[1:4, 2:6] = True
    monkeypatch.setattr(lvvit_model, "draw_exchanged", lambda rows, columns, device: box.flatten().to(device))
    model = micro(keep_rate=rates, img_size=(32, 48), dynamic_img_size=dynamic).double().train()
    x = images(5, 32, 48, dtype=torch.float64)
    _, logits, aux_logits, ids = slow_lvvit(model, x, rates, (1, 2, 3), exchanged=box)
    model.to(device)
    with torch.set_grad_enabled(gradients):
        output = model(x.to(device))
    assert isinstance(output, TokenLabelOutput)
    out = TokenLabelOutput(*(tensor.cpu() for tensor in output))
    torch.testing.assert_close(out.logits, logits, rtol=1e-10, atol=1e-11)
    assert torch.equal(out.patches.sort().values, ids.sort().values)
    torch.testing.assert_close(
        by_patch(out.aux_logits, out.patches, 24), by_patch(aux_logits, ids, 24), rtol=1e-10, atol=1e-11
    )
    for b in range(5):
        for k, patch in enumerate(out.patches[b].tolist()):
            elsewhere = patch >= 0 and bool(box[patch // 6, patch % 6])
            assert out.images[b, k] == (4 - b if elsewhere else b)
    assert out.own_share == pytest.approx(1 - 12 / 24)
    assert out.images.dtype == out.patches.dtype == torch.int64


def test_without_mix_token() -> None:
    model = micro(keep_rate=0.6, mix_token=False).train()
    output = model(images())
    assert torch.equal(output.images, torch.arange(3).unsqueeze(1).expand(output.patches.shape))
    assert output.own_share == 1
    assert torch.equal(model(images()).logits, output.logits)


def test_mix_token_in_training_only() -> None:
    model = micro(keep_rate=0.6).double()
    x = images(dtype=torch.float64)
    assert torch.equal(model(x), model(x))
    model.train()
    torch.manual_seed(1)
    first = model(x)
    shares = {first.own_share.item()} | {model(x).own_share.item() for _ in range(10)}
    assert len(shares) > 1
    torch.manual_seed(1)
    assert torch.equal(model(x).logits, first.logits)


def test_boxes_are_drawn_like_the_published_ones() -> None:
    """Sizes and places against a plain rewriting of the published rule, whose numbers come from NumPy."""
    random = np.random.RandomState(0)
    rows, columns, draws = 14, 10, 20000
    ours, theirs = np.zeros((rows, columns)), np.zeros((rows, columns))
    areas: tuple[list[int], list[int]] = ([], [])
    for _ in range(draws):
        box = draw_exchanged(rows, columns).reshape(rows, columns).numpy()
        assert box.sum() == box.any(axis=0).sum() * box.any(axis=1).sum()
        ours += box
        areas[0].append(box.sum())
        cut = math.sqrt(1 - random.beta(1.0, 1.0))
        height, width = int(rows * cut), int(columns * cut)
        row, column = random.randint(rows), random.randint(columns)
        box = np.zeros((rows, columns))
        box[
            max(row - height // 2, 0) : min(row + height // 2, rows),
            max(column - width // 2, 0) : min(column + width // 2, columns),
        ] = 1
        theirs += box
        areas[1].append(int(box.sum()))
    # A share of 20000 draws has a standard deviation of at most 0.0035, a difference of two 0.005.
    assert np.abs(ours / draws - theirs / draws).max() < 0.025
    for share in (0.05, 0.25, 0.5, 0.75, 0.95):
        assert abs(np.quantile(areas[0], share) - np.quantile(areas[1], share)) <= 3
    assert abs(np.mean(areas[0]) - np.mean(areas[1])) < 1.5


def test_gradient_checkpointing() -> None:
    results = []
    for checkpointing in (False, True):
        model = micro(keep_rate=0.6, drop_path_rate=0.2).train()
        model.set_grad_checkpointing(checkpointing)
        torch.manual_seed(2)
        with evit_ext.record_tokens(model) as record:
            output = model(images())
            (output.logits.sum() + output.aux_logits.square().sum()).backward()
        results.append((output.patches, record.kept, [parameter.grad for parameter in model.parameters()]))
    assert torch.equal(results[0][0], results[1][0])
    for plain, checkpointed in zip(results[0][1], results[1][1], strict=True):
        assert torch.equal(plain, checkpointed)
    for plain, checkpointed in zip(results[0][2], results[1][2], strict=True):
        torch.testing.assert_close(plain, checkpointed)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_compile_training_with_mix_token(checkpointing: bool) -> None:
    model = micro(keep_rate=0.6).train()
    model.set_grad_checkpointing(checkpointing)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    shares = set()
    for seed in range(4):
        torch.manual_seed(seed)
        output = compiled(images())
        torch.manual_seed(seed)
        expected = model(images())
        for a, b in zip(output, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        shares.add(output.own_share.item())
    assert len(shares) > 1
    output.aux_logits.sum().backward()
    assert model.patch_embed.conv1.weight.grad.isfinite().all()


def test_every_parameter_takes_part() -> None:
    """Which DistributedDataParallel asks for."""
    model = micro(keep_rate=0.6).train()
    output = model(images())
    (output.logits.sum() + output.aux_logits.sum()).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
