"""keep_rate_schedule against the formula of the published code, at its ends and outside of its domain."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest

from evit_ext import keep_rate_levels, keep_rate_schedule


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


def test_levels_of_every_number_of_patches() -> None:
    """Each keep rate keeps just the patches that are meant, computed as a block computes it."""
    for total in range(1, 1025):
        levels = keep_rate_levels(1 / 2048, total, 1)
        assert [math.ceil(rate * total) for rate in levels] == list(range(total, 0, -1))


@pytest.mark.parametrize("base", [0.05, 0.3, 0.5, 0.7, 0.9, 0.997, 1.0])
@pytest.mark.parametrize("step", [1, 2, 7, 16, 500])
def test_levels(base: float, step: int) -> None:
    for total in (1, 2, 16, 25, 49, 196, 197, 576, 1024):
        levels = keep_rate_levels(base, total, step)
        kept = [math.ceil(rate * total) for rate in levels]
        least = math.ceil(base * total)
        assert len(levels) == math.ceil((total - least) / step) + 1
        assert kept == [*range(total, least, -step), least]
        assert levels[-1] == base and all(later < earlier for earlier, later in pairwise(levels))
        assert levels[0] == (1.0 if least < total else base)


@pytest.mark.parametrize(("base", "numbers"), [(0.7, (59, 9, 5)), (0.5, (99, 14, 8))])
def test_levels_of_deit_small(base: float, numbers: tuple[int, ...]) -> None:
    assert tuple(len(keep_rate_levels(base, 196, step)) for step in (1, 8, 16)) == numbers


@pytest.mark.parametrize(("total", "token_step"), [(196, 16), (196, 1), (25, 3), (9, 100)])
def test_whole_tokens(total: int, token_step: int) -> None:
    """The least allowed number of patches that is not less than the published schedule's."""
    levels = keep_rate_levels(0.7, total, token_step)
    allowed = [math.ceil(rate * total) for rate in levels]
    seen = []
    for step in range(120 * 7):
        arguments = {"steps_per_epoch": 7, "base_keep_rate": 0.7}
        published = math.ceil(keep_rate_schedule(step, **arguments) * total)
        rate = keep_rate_schedule(step, **arguments, num_patches=total, token_step=token_step)
        assert rate in levels
        assert math.ceil(rate * total) == min(kept for kept in allowed if kept >= published)
        seen.append(rate)
    assert seen == sorted(seen, reverse=True) and set(seen) == set(levels)
    assert seen[:71] == [1.0] * 71 and seen[770:] == [0.7] * 70


def test_without_a_token_step_it_is_as_published() -> None:
    arguments = {"steps_per_epoch": 7, "base_keep_rate": 0.7}
    assert keep_rate_schedule(300, **arguments, num_patches=196) == keep_rate_schedule(300, **arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base_keep_rate": 0.0}, r"base_keep_rate must be in \(0, 1\], got 0.0"),
        ({"num_patches": 0}, "num_patches must be at least 1, got 0"),
        ({"num_patches": None}, "token_step 8 needs num_patches"),
        ({"token_step": 0}, "token_step must be at least 1, got 0"),
    ],
)
def test_errors_of_levels(change: dict[str, Any], message: str) -> None:
    arguments = {"base_keep_rate": 0.7, "num_patches": 196, "token_step": 8, **change}
    with pytest.raises(ValueError, match=message):
        keep_rate_schedule(3, steps_per_epoch=1, **arguments)
    if arguments["num_patches"] is not None:
        with pytest.raises(ValueError, match=message):
            keep_rate_levels(**arguments)
