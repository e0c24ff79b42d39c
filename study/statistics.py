"""Means and differences with intervals over seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy.stats import t as student_t

#: Share of the intervals that contain what they estimate.
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its interval (Student's t, which takes the runs' values as normal).

    Attributes:
        mean: NaN if there are no runs.
        low, high: ends of the interval; infinite with fewer than two runs.
        runs: how many.
    """

    mean: float
    low: float
    high: float
    runs: int

    def __str__(self) -> str:
        if self.runs == 0:
            return "not run"
        if self.runs == 1:
            return f"{self.mean:.2f} (1 run)"
        return f"{self.mean:.2f} [{self.low:.2f}, {self.high:.2f}] ({self.runs} runs)"


def estimate(values: Sequence[float]) -> Estimate:
    """Return the mean of `values`, one for each run, with its interval."""
    runs = len(values)
    if runs == 0:
        return Estimate(math.nan, -math.inf, math.inf, 0)
    mean = statistics.fmean(values)
    if runs == 1:
        return Estimate(mean, -math.inf, math.inf, 1)
    half = student_t.ppf((1 + CONFIDENCE) / 2, runs - 1) * statistics.stdev(values) / math.sqrt(runs)
    return Estimate(mean, mean - half, mean + half, runs)


def difference(one: Mapping[int, float], other: Mapping[int, float]) -> Estimate:
    """Return the mean of ``one - other`` over the seeds that both have; seeds are pairs."""
    return estimate([one[seed] - other[seed] for seed in sorted(one.keys() & other.keys())])


def verdict(found: Estimate, margin: float | None = None) -> str:
    """Return in words what a difference shows.

    Args:
        found: a difference.
        margin: a difference within ± this is none that matters; None asks whether it is above or below 0.
    """
    if found.runs < 2:
        return "not shown: fewer than two runs"
    if margin is not None:
        if -margin <= found.low and found.high <= margin:
            return f"the same within ± {margin:g}"
        if found.high < -margin:
            return f"lower by more than {margin:g}"
        if found.low > margin:
            return f"higher by more than {margin:g}"
    if found.low > 0:
        return "higher"
    if found.high < 0:
        return "lower"
    return "no difference shown"
