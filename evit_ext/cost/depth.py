"""Spreading a reduction over the depth: keep rates, block by block, that fit a budget."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from evit_ext._util.choices import SCHEDULES
from evit_ext._util.messages import shown
from evit_ext.cost.macs import count_macs, input_size
from evit_ext.cost.tokens import count_tokens
from evit_ext.models.by_name import create_evit
from evit_ext.patching.families import drop_locations
from evit_ext.patching.keep_rates import set_keep_rate

#: Keep rates are tried in steps of so much, for the block that drops most.
STEP = 0.001


class DepthFit(NamedTuple):
    """Where a model reduces its tokens, by how much, and what that costs.

    Attributes:
        drop_loc: numbers of the reorganising blocks.
        keep_rates: the share of the patch tokens that each of them keeps.
        macs: multiply-accumulates of one image, as :func:`evit_ext.count_macs` counts them.
        tokens: patch tokens that leave the last of these blocks.
    """

    drop_loc: tuple[int, ...]
    keep_rates: tuple[float, ...]
    macs: int
    tokens: int


def fit_keep_rates(
    model: str,
    macs: float | None = None,
    *,
    tokens: int | None = None,
    shape: str = "constant",
    drop_loc: Sequence[int] | None = None,
    **arguments: Any,
) -> DepthFit:
    """Return keep rates for any blocks of a model, the highest of a shape that fit a budget.

    The paper drops the same share in three blocks. Dropping little in early blocks and much in late ones, or
    the other way round, can cost the same; which is better is for a measurement to say. Of L blocks, block
    number i (from 0) drops a share of the patch tokens that enter it: d if `shape` is "constant",
    ``d · (i + 1) / L`` if it is "rising", ``d · (L − i) / L`` if it is "falling". Of all d in steps of 0.001,
    the smallest is taken that fits the budget. Nothing is computed: the model is built on the meta device.

    Args:
        model: its name in :mod:`evit_ext.models` or timm's registry.
        macs: the budget: multiply-accumulates of one image.
        tokens: or else the patch tokens that may leave the last of the blocks, fused ones included.
        shape: "constant", "rising" or "falling".
        drop_loc: numbers of the blocks, such as ``range(1, 12)``; by default those at the quarters of the
            depth, as in the paper.
        arguments: as of :func:`evit_ext.models.by_name.create_evit`, such as ``img_size``, ``fuse_token`` or
            ``rule="tome"``.

    Returns:
        A :class:`DepthFit`. With EViT's rule, ``evit_ext.apply(vit, fit.keep_rates, fit.drop_loc)`` uses it.

    Raises:
        TypeError, ValueError: an argument is wrong, or no keep rate that the rule allows fits the budget.

    Example:
        >>> fit = evit_ext.fit_keep_rates("deit_small", 3.0e9, shape="rising", drop_loc=(3, 6, 9))
        >>> fit.keep_rates
        (0.8027, 0.6053, 0.408)
    """
    if shape not in SCHEDULES:
        raise ValueError(f"shape must be one of {', '.join(map(repr, SCHEDULES))}, got {shown(shape)}")
    if (macs is None) == (tokens is None):
        raise ValueError(
            f"give one budget, macs or tokens, got macs={shown(macs)} and tokens={shown(tokens)}"
        )
    given: Any = tokens if macs is None else macs
    is_number = isinstance(given, numbers.Real) and not isinstance(given, bool)
    budget = float(given) if is_number else math.nan
    if not 0 < budget < math.inf:
        raise ValueError(f"{'tokens' if macs is None else 'macs'} must be positive, got {shown(given)}")
    with torch.device("meta"):
        vit = create_evit(model, 1.0, drop_loc, **arguments).eval()
    locations = tuple(drop_locations(vit))
    size = input_size(vit, arguments.get("img_size"))[1]

    def cost(steps: int) -> int | None:
        """Return what d = `steps` * STEP costs; None where the rule does not allow such keep rates."""
        try:
            set_keep_rate(vit, _rates(steps * STEP, len(locations), shape))
        except ValueError:
            return None
        return count_tokens(vit, size)[-1] if macs is None else count_macs(vit, size)

    # The cost falls with d, or stays; beyond some d, a keep rate is too low for the rule.
    low, high = 0, round(1 / STEP)
    while low < high:
        middle = (low + high) // 2
        found = cost(middle)
        low, high = (low, middle) if found is None or found <= budget else (middle + 1, high)
    if cost(low) is None:
        least = cost(low - 1)
        what = f"{least} tokens" if macs is None else f"{(least or 0) / 1e9:.3g} GMACs"
        raise ValueError(
            f"the budget is too small for {model}: a {shape} schedule over the blocks {locations} needs "
            f"{what} at least; let more blocks, or earlier ones, reduce tokens (drop_loc)"
        )
    rates = tuple(_rates(low * STEP, len(locations), shape))
    return DepthFit(locations, rates, count_macs(vit, size), count_tokens(vit, size)[-1])


def _rates(most: float, number: int, shape: str) -> list[float]:
    """Return the keep rates of `number` blocks, of which the one that drops most drops `most`."""
    shares = [1.0 if shape == "constant" else (i + 1) / number for i in range(number)]
    if shape == "falling":
        shares.reverse()
    return [round(1 - most * share, 4) for share in shares]
