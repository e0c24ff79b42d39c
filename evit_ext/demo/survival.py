"""Does the network keep the object? The share of the object's patches that survive each stage."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from evit_ext._util.modes import eval_mode
from evit_ext.data import CanvasBatch, object_patches
from evit_ext.patching.recording import record_tokens
from evit_ext.training import Precision, autocast
from evit_ext.visualize.views import surviving_patches


def measure_survival(
    model: nn.Module, batches: Iterable[CanvasBatch], patch_size: int, precision: Precision
) -> tuple[list[float], list[float]]:
    """Return for each stage the mean share of the object's patches that survive it, and that at random."""
    shares = []
    for batch in batches:
        _, kept, num_candidates = recorded(model, batch.images, precision)
        shares.append(object_survival(kept, object_patches(batch.masks, patch_size).to(kept[0].device)))
    num_kept = [ids.shape[1] for ids in kept]
    return torch.cat(shares).mean(dim=0).tolist(), random_survival(num_kept, num_candidates)


def recorded(
    model: nn.Module, images: Tensor, precision: Precision
) -> tuple[Tensor, list[Tensor], list[int]]:
    """Return the predictions [B], what each stage kept, and among how many tokens it chose."""
    device = next(model.parameters()).device
    with (
        eval_mode(model),
        torch.inference_mode(),
        autocast(device, precision),
        record_tokens(model) as record,
    ):
        predicted = model(images.to(device)).argmax(dim=1)
    plans = [record.trail.plan(stage) for stage in record.trail.stages]
    return predicted, record.kept, [plan.num_patches for plan in plans]


def object_survival(kept: Sequence[Tensor], object_patches: Tensor) -> Tensor:
    """The share of each image's object patches that survive each stage.

    Args:
        kept: for each stage, the patches it kept, as :func:`evit_ext.visualize.surviving_patches` takes them.
        object_patches: bool [B, patches], at least one True in every row.

    Returns:
        float64 [B, stages].

    Raises:
        ValueError: an image without an object.
    """
    size = object_patches.sum(dim=1)
    if not bool((size > 0).all()):
        raise ValueError("every image must have at least one object patch")
    survivors = surviving_patches(kept, object_patches.shape[1])
    shares = [(mask & object_patches).sum(dim=1).double() / size for mask in survivors]
    return torch.stack(shares, dim=1)


def random_survival(num_kept: Sequence[int], num_candidates: Sequence[int]) -> list[float]:
    """The share of any patch set that is expected to survive if each stage chose at random as many tokens.

    A stage that keeps K of M candidates keeps each with probability K / M. From the second stage on, the
    fused token of the stage before is one of the M, so it takes a place as it does in the network.

    Args:
        num_kept: K of each stage.
        num_candidates: M of each stage.

    Raises:
        ValueError: the two differ in length, or a stage keeps more than there are.
    """
    if len(num_kept) != len(num_candidates):
        raise ValueError(f"{len(num_kept)} stages keep tokens, {len(num_candidates)} have candidates")
    shares, share = [], 1.0
    for kept, candidates in zip(num_kept, num_candidates, strict=True):
        if not 0 < kept <= candidates:
            raise ValueError(f"a stage cannot keep {kept} of {candidates} tokens")
        share *= kept / candidates
        shares.append(share)
    return shares
