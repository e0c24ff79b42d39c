"""The most probable classes, by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class NamedProbability(NamedTuple):
    """A class and how probable the model finds it."""

    name: str
    probability: float


def most_probable(
    probabilities: Tensor | None, names: Sequence[str] | None, most: int = 5
) -> list[NamedProbability]:
    """Return the `most` probable classes, best first; none where `probabilities`, [classes], is None.

    Without `names`, classes are called by their numbers, from 0.
    """
    if probabilities is None:
        return []
    best = probabilities.topk(min(most, len(probabilities)))
    return [
        NamedProbability(f"class {number}" if names is None else names[number], value)
        for number, value in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]
