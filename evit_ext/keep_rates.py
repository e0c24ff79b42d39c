"""Keep rates of any model: of an EViT's blocks, or of a DynamicViT."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from evit_ext.apply import set_keep_rate as set_of_evit
from evit_ext.families import reorganizing_blocks


def set_keep_rate(model: nn.Module, keep_rate: float | Sequence[float]) -> None:
    """Set the keep rate of an EViT or a DynamicViT.

    Raises:
        TypeError, ValueError: as :func:`evit_ext.set_keep_rate`.
    """
    if hasattr(model, "score_predictor"):
        model.keep_rate = keep_rate  # type: ignore[assignment]
    else:
        set_of_evit(model, keep_rate)


def keep_rates(model: Any) -> list[float]:
    """Return the keep rates of the model's stages, one number where all are the same; [1] if it has none."""
    if hasattr(model, "score_predictor"):
        rate = model.keep_rate
        rates = list(rate) if isinstance(rate, tuple) else [rate]
    else:
        rates = [block.keep_rate for block in reorganizing_blocks(model)] or [1.0]
    return rates[:1] if len(set(rates)) == 1 else rates
