"""Does the network keep the object? The share of the object's patches that survive each stage."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from evit_ext.visualize.views import surviving_patches


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
