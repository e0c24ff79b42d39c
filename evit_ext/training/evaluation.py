"""Evaluation: how often the model is right."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from evit_ext.training.modes import eval_mode
from evit_ext.training.precision import Precision, autocast, choose_precision


@dataclass(frozen=True)
class Evaluation:
    """`top1` in percent, `loss` the mean cross-entropy, `images` how many there were."""

    top1: float
    loss: float
    images: int


def evaluate(
    model: nn.Module,
    batches: Iterable[Any],
    precision: Precision | None = None,
) -> Evaluation:
    """Accuracy and loss on the batches, in eval mode; the model's mode is put back.

    Args:
        model: returns logits [B, classes].
        batches: tuples that begin with images float [B, C, H, W] and labels int64 [B].
        precision: by default chosen for the model's device.

    Raises:
        ValueError: there is no image.
    """
    device = next(model.parameters()).device
    precision = precision or choose_precision(device)
    correct, images_seen = 0, 0
    total_loss = 0.0
    with eval_mode(model), torch.inference_mode():
        for images, labels, *_ in batches:
            labels = labels.to(device)
            with autocast(device, precision):
                logits = model(images.to(device))
            total_loss += nn.functional.cross_entropy(logits.float(), labels, reduction="sum").item()
            correct += int((logits.argmax(dim=1) == labels).sum())
            images_seen += len(labels)
    if not images_seen:
        raise ValueError("there is no image to evaluate on")
    return Evaluation(100 * correct / images_seen, total_loss / images_seen, images_seen)
