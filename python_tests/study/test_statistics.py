"""Intervals over seeds, against numbers that SciPy's own tests and simulation give."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from study.statistics import difference, estimate, verdict


def test_interval_is_scipys() -> None:
    values = [71.0, 72.5, 70.2, 73.1, 71.9]
    found = estimate(values)
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert found.runs == 5 and found.mean == pytest.approx(np.mean(values))
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


def test_intervals_hold_what_they_promise() -> None:
    """Of 2,000 studies of five runs, about 95 % have the truth in their interval."""
    drawn = np.random.default_rng(0).normal(80, 1, (2000, 5))
    holds = [found.low < 80 < found.high for found in map(estimate, drawn.tolist())]
    assert 0.935 < np.mean(holds) < 0.965


def test_differences_are_of_pairs() -> None:
    found = difference({0: 1.0, 1: 5.0, 2: 9.0}, {0: 0.0, 1: 4.0, 3: 100.0})
    assert (found.mean, found.runs) == (1.0, 2) and found.low == found.high == 1.0
    assert difference({0: 1.0}, {1: 1.0}).runs == 0


@pytest.mark.parametrize(
    ("values", "margin", "said"),
    [
        ([1.0, 1.1, 0.9], None, "higher"),
        ([-1.0, -1.1, -0.9], None, "lower"),
        ([1.0, -1.1, 0.2], None, "no difference shown"),
        ([0.1, 0.0, 0.05], 0.5, "the same within ± 0.5"),
        ([-1.0, -1.1, -0.9], 0.5, "lower by more than 0.5"),
        ([1.0, 1.1, 0.9], 0.5, "higher by more than 0.5"),
        ([1.0, -1.1, 0.2], 0.5, "no difference shown"),
        ([0.6, 0.4, 0.5], 0.5, "higher"),
        ([7.0], None, "not shown: fewer than two runs"),
        ([], None, "not shown: fewer than two runs"),
    ],
)
def test_verdicts(values: list[float], margin: float | None, said: str) -> None:
    assert verdict(estimate(values), margin) == said


def test_what_one_run_says() -> None:
    assert str(estimate([80.0])) == "80.00 (1 run)" and math.isinf(estimate([80.0]).high)
    assert str(estimate([])) == "not run"
