"""Images per second, measured so that models can be compared."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from evit_ext._util.modes import eval_mode
from evit_ext.training.precision import Precision, autocast, choose_precision


def measure_throughput(
    models: Mapping[str, nn.Module],
    images: Tensor,
    repeats: int = 15,
    precision: Precision | None = None,
) -> dict[str, float]:
    """Return the images per second of each model in inference.

    The models take turns, so that other work on the machine disturbs all of them alike, and each model's
    figure is that of its median forward.

    Args:
        models: by name; put into eval mode for the measurement and back.
        images: a batch [B, C, H, W], on the models' device.
        repeats: timed forwards per model, after one that is not timed.
        precision: by default chosen for the device of `images`.

    Returns:
        For each name, B over the median time.

    Raises:
        ValueError: no model, no image or no repeat.
    """
    if not models or not len(images) or repeats < 1:
        raise ValueError(
            f"nothing to measure: {len(models)} models, {len(images)} images, {repeats} repeats; each must "
            "be at least 1"
        )
    precision = precision or choose_precision(images.device)
    seconds: dict[str, list[float]] = {name: [] for name in models}
    with eval_mode(*models.values()), torch.inference_mode(), autocast(images.device, precision):
        for repeat in range(repeats + 1):
            for name, model in models.items():
                elapsed = _time(model, images)
                if repeat:
                    seconds[name].append(elapsed)
    return {name: len(images) / statistics.median(times) for name, times in seconds.items()}


def _time(model: nn.Module, images: Tensor) -> float:
    synchronize = torch.cuda.synchronize if images.is_cuda else None
    if synchronize is not None:
        synchronize(images.device)
    start = time.perf_counter()
    model(images)
    if synchronize is not None:
        synchronize(images.device)
    return time.perf_counter() - start
