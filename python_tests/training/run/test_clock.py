"""The seconds of a run and of its training, over interruptions."""

from __future__ import annotations

import pytest

from evit_ext.training.run.clock import RunClock


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What the clock of the machine says, to be set."""
    time = [1000.0]
    monkeypatch.setattr("evit_ext.training.run.clock.time.perf_counter", lambda: time[0])
    return time


def test_training_is_part_of_the_run(now: list[float]) -> None:
    clock = RunClock()
    now[0] += 50
    assert clock.state() == {"seconds": 0.0, "training_seconds": 0.0}
    clock.start()
    now[0] += 3
    with clock.training():
        now[0] += 10
        assert clock.state() == {"seconds": 13.0, "training_seconds": 10.0}
        now[0] += 5
    now[0] += 100  # evaluation
    assert (clock.seconds, clock.training_seconds) == (118.0, 15.0)
    with clock.training():
        now[0] += 1
    assert (clock.seconds, clock.training_seconds) == (119.0, 16.0)


def test_interrupted_and_resumed(now: list[float]) -> None:
    first = RunClock()
    first.start()
    with pytest.raises(KeyboardInterrupt), first.training():
        now[0] += 7
        state = {**first.state(), "weights": 0.0}
        raise KeyboardInterrupt
    now[0] += 1000
    second = RunClock()
    second.load_state(state)
    second.start()
    now[0] += 2
    with second.training():
        now[0] += 4
    assert (second.seconds, second.training_seconds) == (13.0, 11.0)
