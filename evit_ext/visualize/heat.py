"""Scores as colours, the same in the picture and on the page."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

# From dark to light, so that the order can also be seen without colour vision and in grey print.
_ANCHORS = np.array(
    [[18, 16, 48], [74, 30, 110], [158, 44, 104], [226, 92, 56], [250, 172, 52], [254, 246, 190]]
)

#: uint8 [256, 3], red, green and blue of each level; their luminance rises with it.
COLORS: npt.NDArray[np.uint8] = np.stack(
    [
        np.interp(np.linspace(0, len(_ANCHORS) - 1, 256), range(len(_ANCHORS)), column)
        for column in _ANCHORS.T
    ],
    axis=1,
).astype(np.uint8)


class Heat(NamedTuple):
    """Scores as levels: `levels` int64 [rows, columns] from 0 to 255, -1 where there is none; the scores that
    levels 0 and 255 stand for."""

    levels: npt.NDArray[np.int64]
    low: float
    high: float


def heat(scores: Tensor) -> Heat:
    """Return the levels of scores [rows, columns], which are NaN where there is none.

    A level rises with the square root of the score's distance from the lowest: most patches get little
    attention and some get much, and on a linear scale all of the former would look the same.
    """
    values = scores.double().numpy()
    there = np.isfinite(values)
    low, high = (float(values[there].min()), float(values[there].max())) if there.any() else (0.0, 0.0)
    share = np.where(there, values - low, 0) / ((high - low) or 1.0)
    levels = np.rint(255 * np.sqrt(share)).astype(np.int64)
    return Heat(np.where(there, levels, -1), low, high)
