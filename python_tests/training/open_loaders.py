"""Loaders for a test, and comparisons of their batches."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from image_data import IMAGE

from evit_ext.training.config import TrainConfig
from evit_ext.training.loaders import Batch, Loaders
from evit_ext.training.ranks import Ranks


def loaders(
    data: Path | None,
    rank: int = 0,
    world_size: int = 1,
    micro_batch: int = 2,
    accumulation: int = 1,
    training: bool = True,
    patch_grid: tuple[int, int] | None = None,
    **fields: Any,
) -> Loaders:
    fields = {
        "data": str(data) if data else None,
        "batch_size": micro_batch * accumulation * world_size,
        "workers": 0,
        "epochs": 10,
        **fields,
    }
    config = TrainConfig(**fields)
    ranks = Ranks(rank, world_size, rank)
    return Loaders(config, ranks, micro_batch, accumulation, IMAGE, patch_grid, training)


def assert_equal(first: list[Batch], second: list[Batch]) -> None:
    assert len(first) == len(second) > 0
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.labels, other.labels)
        assert one.unreadable == other.unreadable
        assert (one.token_labels is None) == (other.token_labels is None)
        if one.token_labels is not None:
            assert torch.equal(one.token_labels, other.token_labels)


def fingerprints(batches: list[Batch] | Iterator[Batch]) -> list[tuple[bytes, int]]:
    """The images with their labels, in an order of their own."""
    return sorted(
        (image.numpy().tobytes(), int(label))
        for batch in batches
        for image, label in zip(batch.images, batch.labels, strict=True)
    )
