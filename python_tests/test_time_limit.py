"""benchmarks/time_limit.py: what is left out for want of time, and what a kill leaves."""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
if not BENCHMARKS.exists():
    pytest.skip("tests run without the source tree", allow_module_level=True)
sys.path.insert(0, str(BENCHMARKS))

import time_limit  # noqa: E402
from time_limit import TimeLimit, at_most, in_time, left_out_lines, write_whole  # noqa: E402


def test_a_group_is_judged_by_the_longest_of_its_kind() -> None:
    now = [100.0]
    limit = TimeLimit(1.0, lambda: now[0])
    assert limit.reason_against("compiled", 60.0) is None
    assert limit.reason_against("compiled", 61.0) == "it would take about 61 s, and 60 s were left"
    limit.took("compiled", 10.0)
    limit.took("compiled", 5.0)
    now[0] += 45.0
    assert limit.passed == 45.0
    assert limit.reason_against("compiled", 99.0) is None
    assert limit.reason_against("compiled", 99.0, 6.0) == "it would take about 10 s, and 9 s were left"
    assert limit.reason_against("eager", 16.0) == "it would take about 16 s, and 15 s were left"
    now[0] += 10.0
    assert limit.reason_against("compiled", 1.0) == "it would take about 10 s, and 5 s were left"
    now[0] += 10.0
    assert limit.reason_against("eager", 1.0) == "it would take about 1 s, and 0 s were left"


def test_one_group_may_take_half_of_all_time_and_never_more_than_is_left() -> None:
    now = [0.0]
    limit = TimeLimit(1.0, lambda: now[0])
    assert limit.of_one == 30.0
    now[0] = 40.0
    assert limit.of_one == 20.0


def test_without_a_limit_everything_fits() -> None:
    limit = TimeLimit(None)
    assert limit.reason_against("any", 1e9) is None
    with at_most(limit.of_one):
        assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_what_takes_too_long_is_ended() -> None:
    start = time.monotonic()
    with pytest.raises(TimeoutError, match="it took more than 0 s"), at_most(0.1):
        time.sleep(20)
    assert time.monotonic() - start < 10
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    with at_most(30.0):
        pass
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_files_are_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "results.json"
    write_whole(path, "old")
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_whole(path, "new")
    assert path.read_text() == "old"


def test_lines() -> None:
    assert left_out_lines([], []) == ""
    assert left_out_lines(["a: no time"], ["b: broken"]) == "Left out: a: no time.\nFailed: b: broken.\n"


def test_groups_for_which_there_is_time(capsys: pytest.CaptureFixture[str]) -> None:
    now = [0.0]
    left_out: list[str] = []
    limit = TimeLimit(1.0, lambda: now[0])
    ran = []
    groups = ["eager 1", "compiled 1", "eager 2", "compiled 2", "eager 3"]
    expected = {"eager": 5.0, "compiled": 50.0}
    for group, later in in_time(groups, limit, left_out, lambda g: expected[g[:-2]], lambda g: g[:-2]):
        ran.append(group)
        assert later == [f"{name}: not yet" for name in groups[groups.index(group) + 1 :]]
        now[0] += 25.0
    # The first eager one has shown that they take longer than expected.
    assert ran == ["eager 1", "eager 2"]
    assert left_out == [
        "compiled 1: it would take about 50 s, and 35 s were left",
        "compiled 2: it would take about 50 s, and 10 s were left",
        "eager 3: it would take about 25 s, and 10 s were left",
    ]
    assert "[3/5, 0:00:25] eager 2\n" in capsys.readouterr().out


def test_after_the_gpu_is_lost_nothing_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    left_out: list[str] = []
    assert time_limit.gpu_is_lost() == ""
    groups = iter(in_time("abc", TimeLimit(None), left_out, lambda group: 1.0))
    assert next(groups)[0] == "a"

    def fail() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with ...")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", fail)
    assert list(groups) == []
    reason = "the GPU is lost to this process: CUDA error: an illegal memory access was encountered"
    assert left_out == [f"b: {reason}", f"c: {reason}"]
