"""Keep rates as people and schedulers give them, checked."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from evit_ext._util.messages import shown


def check_keep_rates(keep_rate: float | Sequence[float], number: int) -> list[float]:
    """Return `number` keep rates, one for each reorganising block, as Python's numbers.

    Args:
        keep_rate: one number, or a list or tuple of `number`.
        number: of the blocks.

    Raises:
        TypeError: a keep rate is not a number.
        ValueError: a keep rate is not in (0, 1], or their number is wrong.
    """
    if isinstance(keep_rate, (list, tuple)):
        rates = list(keep_rate)
        if len(rates) != number:
            raise ValueError(
                f"keep_rate must be one number or {number}, one for each reorganising block, got {len(rates)}"
            )
    else:
        rates = [keep_rate] * number
    return [check_keep_rate(rate) for rate in rates]


def check_keep_rate(keep_rate: Any) -> float:
    """Return a keep rate as a Python number.

    A NumPy number, or an array or tensor without dimensions, as schedulers give them, is taken for the
    decimal number that it shows: float32's 0.1 is 0.10000000149, of which 10 patches would keep 2.

    Raises:
        TypeError: it is not a number.
        ValueError: it is not in (0, 1].
    """
    rate = _number(keep_rate)
    if isinstance(rate, bool) or not isinstance(rate, numbers.Real):
        raise TypeError(
            f"keep_rate must be a number in (0, 1], or a list or tuple of them, got {shown(rate)}"
        )
    # Written so that NaN is refused.
    if not 0 < float(rate) <= 1:
        raise ValueError(f"keep_rate must be in (0, 1], got {rate}")
    return float(rate)


def _number(rate: Any) -> Any:
    """Return a NumPy number, or a tensor or array without dimensions, as a Python number."""
    if isinstance(rate, Tensor) and rate.dim() == 0:
        rate = rate.detach().cpu().float().numpy()[()] if rate.is_floating_point() else rate.item()
    elif getattr(rate, "shape", None) == () and hasattr(rate, "item"):
        rate = rate[()]
    if getattr(rate, "dtype", None) is not None and getattr(rate, "shape", None) == ():
        return float(str(rate)) if rate.dtype.kind == "f" else rate.item()
    return rate
