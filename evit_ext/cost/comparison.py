"""What EViT and DynamicViT cost, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from evit_ext import models
from evit_ext._util.messages import shown
from evit_ext.cost.macs import count_macs
from evit_ext.patching.keep_rates import set_keep_rate


class Cost(NamedTuple):
    """Parameters, and multiply-accumulates of one image, of a model at a keep rate."""

    model: str
    keep_rate: float
    parameters: int
    macs: int


def compare_costs(
    size: Literal["tiny", "small", "base"] = "small",
    keep_rates: Sequence[float] = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5),
    img_size: int | tuple[int, int] = 224,
) -> list[tuple[Cost, Cost]]:
    """Return what inference with an EViT and a DynamicViT of DeiT's size costs, for each keep rate.

    Both as published, with three stages at blocks 3, 6 and 9; EViT with a fused token. DynamicViT's
    predictors run at keep rate 1 too. Nothing is computed and no memory is taken: the models are on the meta
    device.

    Args:
        size: "tiny", "small" or "base".
        keep_rates: share of the patches that a stage keeps, in (0, 1].
        img_size: size of the images.

    Returns:
        For each keep rate the :class:`Cost` of EViT and that of DynamicViT.

    Raises:
        ValueError: a size that is not known, or a keep rate out of range.
    """
    if size not in ("tiny", "small", "base"):
        raise ValueError(f"size must be 'tiny', 'small' or 'base', got {shown(size)}")
    options: dict[str, Any] = {"img_size": img_size, "weight_init": "skip"}
    with torch.device("meta"):
        evit = getattr(models, f"deit_{size}")(**options).eval()
        dynamicvit = getattr(models, f"dynamicvit_{size}")(**options).eval()
    costs = []
    for keep_rate in keep_rates:
        set_keep_rate(evit, keep_rate)
        set_keep_rate(dynamicvit, keep_rate)
        costs.append((_cost("EViT", keep_rate, evit), _cost("DynamicViT", keep_rate, dynamicvit)))
    return costs


def _cost(name: str, keep_rate: float, model: nn.Module) -> Cost:
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Cost(name, keep_rate, parameters, count_macs(model))
