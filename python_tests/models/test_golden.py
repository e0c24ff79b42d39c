"""The models against golden files of the published code: logits, kept patches and gradients, in float64.

The published EViT orders the kept tokens by score, so the patches are compared as sets. Agreement is promised
to 1e-9 relative, relative to the largest logit and to a gradient's norm; measured was at most 3e-15 for
logits and 2e-14 for gradients. LV-ViT has logits only, without reorganisation; measured was 2e-15.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import evit_ext
from evit_ext import models

TOLERANCE = 1e-9


def run(model: Any, images: Tensor, golden: dict[str, Tensor]) -> Tensor:
    """Compare logits and patches of `model` with a golden file; return the logits."""
    with evit_ext.record_tokens(model) as record:
        logits = model(images)
    expected = golden["logits"]
    assert (logits.detach().cpu() - expected).abs().max() <= TOLERANCE * expected.abs().max()
    assert len(record.kept) == sum(name.startswith("idx") for name in golden)
    for stage, kept in enumerate(record.kept):
        # The files hold -1, an earlier fused token, first.
        assert torch.equal(kept.cpu().sort(dim=1).values, golden[f"idx{stage}"].long())
    return logits


@pytest.mark.parametrize("fuse", [False, True])
def test_micro(fuse: bool, golden: Any, weights: ModuleType, device: torch.device) -> None:
    arrays = golden(f"micro_k0.7_f{int(fuse)}")
    model = models.deit_tiny(
        keep_rate=0.7,
        fuse_token=fuse,
        img_size=32,
        patch_size=4,
        embed_dim=48,
        num_heads=3,
        num_classes=10,
    )
    model = weights.fill(model.double()).to(device)
    logits = run(model, weights.images(2, 32).to(device), arrays)

    (logits * weights.loss_weights(logits.shape).to(device)).sum().backward()
    keys = {key.removeprefix("grad/") for key in arrays if key.startswith("grad/")}
    assert keys == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        gradient = parameter.grad.cpu()
        norm, projected = arrays[f"grad/{name}"].tolist()
        assert abs(gradient.norm().item() - norm) <= TOLERANCE * norm, name
        # The projection may cancel, so its error is held against what it could be, the norm.
        projection = weights.projection(name, gradient.shape)
        assert abs((gradient * projection).sum().item() - projected) <= TOLERANCE * norm, name


def test_small(golden: Any, weights: ModuleType, device: torch.device) -> None:
    model = weights.fill(models.deit_small(keep_rate=0.7, weight_init="skip").double()).to(device).eval()
    with torch.no_grad():
        run(model, weights.images(2, 224).to(device), golden("small_k0.7_f1"))


@pytest.mark.parametrize("applied", [True, False])
def test_lvvit_small(applied: bool, golden: Any, weights: ModuleType, device: torch.device) -> None:
    model = models.lvvit_small(keep_rate=1.0, weight_init="skip").double()
    if not applied:
        evit_ext.remove(model)
    model = weights.fill(model).to(device).eval()
    expected = golden("lvvit_s_k1")["logits"]
    with torch.no_grad():
        logits = model(weights.images(2, 224).to(device))
    assert (logits.cpu() - expected).abs().max() <= 1e-12 * expected.abs().max()
