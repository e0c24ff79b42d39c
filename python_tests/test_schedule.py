"""keep_rate_schedule against the formula of the published code, at its ends and outside of its domain."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from evit_ext import keep_rate_schedule


def test_ends() -> None:
    schedule = [keep_rate_schedule(step, steps_per_epoch=7, base_keep_rate=0.7) for step in range(120 * 7)]
    assert schedule[: 10 * 7 + 1] == [1.0] * 71
    assert schedule[110 * 7 :] == [0.7] * 70
    # Strictly down in between.
    falling = schedule[10 * 7 : 110 * 7 + 1]
    assert all(later < earlier for earlier, later in pairwise(falling))


@pytest.mark.parametrize("base", [0.5, 0.7, 0.9])
@pytest.mark.parametrize("step", [71, 100, 420, 700, 769])
def test_cosine(step: int, base: float) -> None:
    expected = base + (1 - base) * 0.5 * (1 + math.cos(math.pi * (step - 70) / 700))
    rate = keep_rate_schedule(step, steps_per_epoch=7, base_keep_rate=base)
    assert rate == pytest.approx(expected, rel=1e-14)


def test_half_way() -> None:
    rate = keep_rate_schedule(30, steps_per_epoch=10, base_keep_rate=0.6, start_epoch=2, end_epoch=4)
    assert rate == pytest.approx(0.8)


def test_falls_at_once_without_an_interval() -> None:
    arguments = {"steps_per_epoch": 10, "base_keep_rate": 0.5, "start_epoch": 3, "end_epoch": 3}
    assert keep_rate_schedule(29, **arguments) == 1.0
    assert keep_rate_schedule(30, **arguments) == 0.5
    assert keep_rate_schedule(0, **{**arguments, "start_epoch": 0, "end_epoch": 0}) == 0.5


def test_base_one_is_one_everywhere() -> None:
    assert {keep_rate_schedule(s, steps_per_epoch=1, base_keep_rate=1) for s in range(0, 200, 10)} == {1.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": -1}, "step must not be negative, got -1"),
        ({"steps_per_epoch": 0}, "steps_per_epoch must be at least 1, got 0"),
        ({"base_keep_rate": 0}, r"base_keep_rate must be in \(0, 1\], got 0"),
        ({"base_keep_rate": 1.5}, "got 1.5"),
        ({"base_keep_rate": math.nan}, "got nan"),
        ({"start_epoch": -1}, "got -1 and 110"),
        ({"start_epoch": 111}, "got 111 and 110"),
    ],
)
def test_errors(change: dict[str, float], message: str) -> None:
    arguments = {"step": 5, "steps_per_epoch": 10, "base_keep_rate": 0.7, **change}
    with pytest.raises(ValueError, match=message):
        keep_rate_schedule(arguments.pop("step"), **arguments)
