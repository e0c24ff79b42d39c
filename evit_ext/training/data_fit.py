"""Settings of the optimisation that fit the size of a folder of images, where nobody has chosen them."""

from __future__ import annotations

import math
import os
from collections.abc import Collection
from dataclasses import replace
from typing import Any

from evit_ext.training.config import TrainConfig
from evit_ext.training.shared_memory import shared_memory_free, shared_memory_needed

#: The recipe whose settings are fitted.
RECIPE = "finetune-folder"
#: The fields that :func:`fit_to_data` may change.
FITTED = (
    "batch_size", "epochs", "warmup_epochs", "lr", "min_lr", "warmup_lr", "workers", "log_every",
    "pretrained",
)  # fmt: skip

# Learning rates of AdamW at batch size 64; at other sizes they go with its square root.
_LR_PRETRAINED = 1e-4
_LR_RANDOM = 5e-4


def fit_to_data(
    config: TrainConfig, given: Collection[str], images: int, pretrained: bool, world_size: int = 1
) -> TrainConfig:
    """Return the configuration with settings that fit the data.

    Batches are a power of two, an eighth of the images or less, and 64 or less. There are 10 to 30 epochs,
    fewer of many images, with a tenth of them for the warm-up.

    Args:
        config: of :data:`RECIPE`, with what was given.
        given: the fields that somebody has chosen, which stay.
        images: to train on, at least 1.
        pretrained: whether pretrained weights can be had.
        world_size: processes, of whose number the batch size is a multiple.
    """
    chosen: dict[str, Any] = {
        "pretrained": pretrained and config.initial_checkpoint is None and config.oracle is None
    }
    batch = min(64, 2 ** int(math.log2(max(images // 8, 1))))
    chosen["batch_size"] = max(1, batch // world_size) * world_size
    chosen["epochs"] = min(30, max(10, round(5000 / images)))
    batch_size, epochs = (getattr(config, name) if name in given else chosen[name] for name in FITTED[:2])
    starts_trained = (
        chosen["pretrained"] or config.initial_checkpoint is not None or config.oracle is not None
    )
    if "pretrained" in given:
        starts_trained = starts_trained or config.pretrained
    lr = (_LR_PRETRAINED if starts_trained else _LR_RANDOM) * math.sqrt(batch_size / 64)
    chosen["lr"] = float(f"{lr:.2g}")
    base = config.lr if "lr" in given else chosen["lr"]
    chosen |= {"min_lr": base / 100, "warmup_lr": base / 100, "warmup_epochs": min(5.0, epochs / 10)}
    steps = epochs * max(1, images // batch_size)
    chosen["log_every"] = min(50, max(1, steps // 100))
    chosen["workers"] = _workers(batch_size // world_size, config.img_size or 224)
    return replace(config, **{name: value for name, value in chosen.items() if name not in given})


def _workers(micro_batch: int, side: int) -> int:
    """Return up to 4 workers, or none where their batches would not fit into shared memory."""
    workers = min(4, os.cpu_count() or 1)
    free = shared_memory_free()
    return (
        0
        if free is not None and shared_memory_needed(workers, micro_batch * 12 * side**2) > free
        else workers
    )
