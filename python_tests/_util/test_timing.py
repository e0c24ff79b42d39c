"""Calls that take turns."""

from __future__ import annotations

import time

import pytest

from evit_ext.benchmark import Here, time_in_turns


def test_turns() -> None:
    made: list[str] = []
    calls = {name: Here(lambda name=name: made.append(name)) for name in "abc"}
    times = time_in_turns(calls, seconds=0.0, least=4)
    assert [len(taken) for taken in times.values()] == [4, 4, 4]
    assert made[:6] == list("abcabc")  # untimed
    rounds = ["".join(made[start : start + 3]) for start in range(6, 18, 3)]
    assert all(sorted(names) == list("abc") for names in rounds)
    assert len(set(rounds)) > 1  # in orders of their own


def test_times() -> None:
    calls = {"short": Here(lambda: time.sleep(0.002)), "long": Here(lambda: time.sleep(0.02))}
    times = time_in_turns(calls, seconds=0.2, least=2)
    assert min(times["short"]) >= 0.002 and min(times["long"]) >= 0.02
    assert sorted(times["short"])[len(times["short"]) // 2] < 0.02
    assert 0.1 < sum(map(sum, times.values())) < 2.0


@pytest.mark.parametrize(("calls", "least"), [({}, 1), ({"a": Here(print)}, 0)])
def test_nothing_to_time(calls: dict[str, Here], least: int) -> None:
    with pytest.raises(ValueError, match=f"{len(calls)} calls, {least} rounds"):
        time_in_turns(calls, least=least)
