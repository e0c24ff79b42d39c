"""What several commands need: keep rates of any model, and tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

import evit_ext
from evit_ext.families import reorganizing_blocks


def set_keep_rate(model: nn.Module, keep_rate: float) -> None:
    """Set the keep rate of an EViT or a DynamicViT.

    Raises:
        TypeError, ValueError: as :func:`evit_ext.set_keep_rate`.
    """
    if hasattr(model, "score_predictor"):
        model.keep_rate = keep_rate  # type: ignore[assignment]
    else:
        evit_ext.set_keep_rate(model, keep_rate)


def keep_rates(model: Any) -> list[float]:
    """Return the keep rates of the model's stages, one number where all are the same; [1] if it has none."""
    if hasattr(model, "score_predictor"):
        rate = model.keep_rate
        rates = list(rate) if isinstance(rate, tuple) else [rate]
    else:
        rates = [block.keep_rate for block in reorganizing_blocks(model)] or [1.0]
    return rates[:1] if len(set(rates)) == 1 else rates


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Return the cells in columns, the first aligned left and the others right."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )
