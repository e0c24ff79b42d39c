"""Evaluation in each of several processes: ``python evaluating_ranks.py``; prints what each found."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import evit_ext
from evit_ext.training import Precision, evaluate
from evit_ext.training.ranks import Ranks, join

FLOAT32 = Precision(torch.float32, "test")
IMAGES = 23


class Batch(NamedTuple):
    images: Tensor
    labels: Tensor
    unreadable: tuple[tuple[str, str], ...] = ()


def build() -> nn.Module:
    torch.manual_seed(0)
    vit = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=24, depth=4, num_heads=2, num_classes=7, weight_init="skip"
    )
    for parameter in vit.parameters():
        nn.init.normal_(parameter, std=0.3)
    return evit_ext.apply(vit, 0.6)


def batches(part: slice, size: int, names: str) -> Iterator[Batch]:
    """Batches of a part of the images; the last one has no image but names one that could not be read."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(IMAGES, 3, 32, 32, generator=generator)[part]
    labels = torch.randint(0, 7, (IMAGES,), generator=generator)[part]
    for start in range(0, len(labels), size):
        yield Batch(images[start : start + size], labels[start : start + size])
    if names:
        yield Batch(images[:0], labels[:0], ((f"{names}.png", "truncated"),))


#: By world size, the part of the images that each rank has.
PARTS = {
    1: [slice(0, IMAGES)],
    2: [slice(0, 16), slice(16, IMAGES)],
    3: [slice(0, 0), slice(0, 5), slice(5, IMAGES)],
}


def main(ranks: Ranks) -> dict[str, Any]:
    part = PARTS[ranks.world_size][ranks.rank]

    def found(model: nn.Module) -> dict[str, Any]:
        model.train()
        # The rank without an image names none either: it has no batch at all.
        name = "" if part.stop == 0 else f"rank{ranks.rank}"
        result = asdict(evaluate(model, batches(part, 4, name), FLOAT32, ranks))
        assert all(module.training for module in model.modules())
        assert all(parameter.grad is None for parameter in model.parameters())
        return result

    results: dict[str, Any] = {}
    if ranks.world_size > 1:
        results["ddp"] = found(DistributedDataParallel(build()))
        sharded: Any = build()
        for block in sharded.blocks:
            fully_shard(block)
        fully_shard(sharded)
        results["fsdp"] = found(sharded)
        # What was evaluated first can still be trained.
        sharded(torch.zeros(1, 3, 32, 32)).sum().backward()
        assert all(parameter.grad is not None for parameter in sharded.parameters())
        try:
            evaluate(sharded, [], FLOAT32, ranks)
        except ValueError as error:
            results["empty"] = str(error)
    # Last: the backward starts threads that need Python once, and must not find it shutting down.
    results["plain"] = found(build())
    return results


if __name__ == "__main__":
    torch.set_num_threads(1)
    with join("cpu", timeout=60) as ranks:
        print(json.dumps(main(ranks)))
