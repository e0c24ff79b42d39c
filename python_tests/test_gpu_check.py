"""The GPU check's own logic, with commands that need no GPU: nothing it does may hide a result."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "gpu-check.py"

pytestmark = pytest.mark.skipif(not SCRIPT.exists(), reason="tests run without the source tree")

FACTS = {"gpu": "NVIDIA Example 9000", "capability": "9.0", "commit": "unknown"}


@pytest.fixture(scope="module")
def check() -> ModuleType:
    spec = importlib.util.spec_from_file_location("evit_gpu_check", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code)


def run(check: ModuleType, steps: list[Any], logs: Path, **arguments: Any) -> dict[str, Any]:
    runner = check.Runner(steps, logs, dict(os.environ), **arguments)
    return {result.name: result for result in runner.run()}


def test_a_failing_step_stops_only_those_that_need_it(check: ModuleType, tmp_path: Path) -> None:
    steps = [
        check.Step("build", (python("print('broken'); raise SystemExit(3)"),), 30, 60),
        check.Step("needs-build", (python(""),), 30, 60, needs=("build",)),
        check.Step("after-build", (python("print('fine')"),), 30, 60, after=("build",)),
        check.Step("other", (python("print('first')"), python("print('second')")), 30, 60),
        check.Step("no-program", (("no-such-program",),), 30, 60),
        check.Step("last", (python(""),), 30, 60, after=("build", "needs-build", "no-program")),
    ]
    results = run(check, steps, tmp_path)
    assert list(results) == [step.name for step in steps]
    assert (results["build"].outcome, results["build"].detail) == ("failed", "exit code 3; broken")
    assert (results["needs-build"].outcome, results["needs-build"].detail) == ("not run", "needs: build")
    assert not results["needs-build"].fine
    assert results["after-build"].outcome == results["other"].outcome == results["last"].outcome == "passed"
    assert results["other"].detail == "second"
    assert "first\n$ " in (tmp_path / "other.log").read_text()
    assert results["no-program"].outcome == "failed" and "no-such-program" in results["no-program"].detail
    assert check.verdict(list(results.values()), 6) == (
        "3 of 6 steps passed; not passed: build, needs-build, no-program"
    )


def test_the_first_command_that_fails_ends_the_step(check: ModuleType, tmp_path: Path) -> None:
    steps = [check.Step("two", (python("raise SystemExit(1)"), python("print('second')")), 30, 60)]
    assert run(check, steps, tmp_path)["two"].outcome == "failed"
    assert "second\n" not in (tmp_path / "two.log").read_text().splitlines()[-1:]


def gone_within(seconds: float, pid: str) -> bool:
    """Whether a process ends in time; dead and not yet collected by its new parent counts."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if "State:\tZ" in Path(f"/proc/{pid}/status").read_text():
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


def test_a_step_is_ended_at_its_limit_with_its_children(check: ModuleType, tmp_path: Path) -> None:
    child = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    code = (
        "import subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, '-c', {child!r}])\n"
        "print('child', child.pid, flush=True)\n"
        "time.sleep(60)"
    )
    start = time.monotonic()
    result = run(check, [check.Step("hangs", (python(code),), 3.0, 60)], tmp_path)["hangs"]
    assert time.monotonic() - start < 20
    assert result.outcome == "timed out" and not result.fine
    assert result.detail.startswith("after 3 s; last line: child")
    assert gone_within(5.0, result.detail.split()[-1])


def test_a_process_that_ignores_being_ended(check: ModuleType, tmp_path: Path) -> None:
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    assert run(check, [check.Step("deaf", (python(code),), 1.5, 60)], tmp_path)["deaf"].outcome == "timed out"


def test_no_time_left(check: ModuleType, tmp_path: Path) -> None:
    result = run(check, [check.Step("late", (python(""),), 30, 0.0)], tmp_path)["late"]
    assert (result.outcome, result.detail, result.fine) == ("not run", "no time left", False)


def test_a_missing_tool_is_a_reason_not_a_failure(check: ModuleType, tmp_path: Path) -> None:
    steps = [
        check.Step("cpp-build", (python(""),), 30, 60, missing="no cmake"),
        check.Step("cpp-tests", (python(""),), 30, 60, needs=("cpp-build",)),
        check.Step("fine", (python(""),), 30, 60),
    ]
    results = run(check, steps, tmp_path)
    assert (results["cpp-build"].outcome, results["cpp-build"].detail) == ("not run", "no cmake")
    assert all(result.fine for result in results.values())
    sentence = check.verdict(list(results.values()), 3)
    assert sentence == "1 of 3 steps passed; not run for want of a tool: cpp-build, cpp-tests"


def test_a_mistake_in_a_judge_fails_its_step(check: ModuleType, tmp_path: Path) -> None:
    def judge(log: str) -> tuple[str, str]:
        raise KeyError("nothing")

    steps = [check.Step("judged", (python(""),), 30, 60, judge=judge), check.Step("other", (), 30, 60)]
    results = run(check, steps, tmp_path)
    assert (results["judged"].outcome, results["judged"].detail) == ("failed", "KeyError: 'nothing'")
    assert results["other"].outcome == "passed"


def test_interrupting(check: ModuleType, tmp_path: Path) -> None:
    steps = [
        check.Step("runs", (python("import time; time.sleep(60)"),), 60, 90),
        check.Step("next", (python(""),), 30, 60, after=("runs",)),
    ]
    runner = check.Runner(steps, tmp_path, dict(os.environ))
    threading.Timer(1.5, runner.interrupt).start()
    first, second = runner.run()
    assert first.outcome == "failed" and f"exit code {-signal.SIGTERM}" in first.detail
    assert (second.outcome, second.detail) == ("not run", "interrupted")


def test_the_summary_is_written_after_every_step(check: ModuleType, tmp_path: Path) -> None:
    stem = tmp_path / "gpu-check-example"
    seen = []

    def write(results: list[Any]) -> None:
        check.write_summary(stem, FACTS, results, 2)
        seen.append(json.loads(stem.with_suffix(".json").read_text()))

    steps = [
        check.Step("one", (python("print('a | b')"),), 30, 60),
        check.Step("two", (python("raise SystemExit(1)"),), 30, 60, after=("one",)),
    ]
    run(check, steps, tmp_path, on_result=write)
    assert seen[0]["verdict"] == "not finished: 1 of 2 steps have ended"
    assert seen[1]["verdict"] == "1 of 2 steps passed; not passed: two"
    assert seen[1]["machine"] == FACTS
    assert [step["outcome"] for step in seen[1]["steps"]] == ["passed", "failed"]
    assert seen[1]["steps"][0]["log"] == "one.log"
    text = stem.with_suffix(".md").read_text()
    assert "- gpu: NVIDIA Example 9000\n" in text and "| one | passed | 0 | a \\| b |" in text


@pytest.mark.parametrize(
    ("log", "expected"),
    [
        ("=== 3 passed, 1 skipped in 2.10s ===", ("passed", "3 passed, 1 skipped")),
        ("=== 2 failed, 3 passed in 2.10s (0:01:00) ===", ("passed", "2 failed, 3 passed")),
        ("=== 4 skipped in 0.10s ===", ("failed", "4 skipped")),
        ("=== 5 deselected in 0.10s ===", ("failed", "5 deselected")),
        (
            "!!!! a.py::b lost the CUDA context: CUDA error !!!!\n=== 1 failed, 2 passed in 1.0s ===",
            ("passed", "1 failed, 2 passed; a.py::b lost the CUDA context: CUDA error"),
        ),
        ("ImportError: no conftest", ("failed", "no summary; last line: ImportError: no conftest")),
    ],
)
def test_summaries_of_pytest(check: ModuleType, log: str, expected: tuple[str, str]) -> None:
    """Failed tests are told by the exit code."""
    assert check.pytest_summary(log) == expected


@pytest.mark.parametrize(
    ("log", "outcome"),
    [
        ("========= COMPUTE-SANITIZER\n10 passed\n========= ERROR SUMMARY: 0 errors", "passed"),
        ("========= ERROR SUMMARY: 2 errors", "failed"),
        ("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", "passed"),
        ("========= RACECHECK SUMMARY: 1 hazard displayed (0 errors, 1 warning)", "failed"),
        ("10 passed", "failed"),
        ("========= Error: Device not supported. Please refer to the documentation", "not run"),
    ],
)
def test_summaries_of_compute_sanitizer(check: ModuleType, log: str, outcome: str) -> None:
    assert check.sanitizer_summary(log)[0] == outcome


def test_an_unsupported_sanitizer_is_excused_whatever_its_exit_code(
    check: ModuleType, tmp_path: Path
) -> None:
    command = python("print('Device not supported'); raise SystemExit(1)")
    step = check.Step("memcheck", (command,), 30, 60, judge=check.sanitizer_summary)
    result = run(check, [step], tmp_path)["memcheck"]
    assert result.outcome == "not run" and result.fine


def test_a_benchmark_without_a_verdict_failed(check: ModuleType) -> None:
    text = "| table |\ntargets met: 3 of 4; missed: one\n"
    assert check.benchmark_summary(text) == ("passed", "targets met: 3 of 4; missed: one")
    assert check.benchmark_summary("AssertionError: differs") == ("failed", "AssertionError: differs")


@pytest.mark.parametrize("quick", [False, True])
def test_plan(check: ModuleType, tmp_path: Path, quick: bool) -> None:
    """Every step can come to run, and in time; the benchmarks are alone."""
    steps = check.plan(FACTS, "python3", tmp_path, 570.0, quick)
    names = [step.name for step in steps]
    assert len(set(names)) == len(names)
    for number, step in enumerate(steps):
        assert {*step.needs, *step.after} <= set(names[:number]), step.name
        assert step.seconds > 0 and step.ends_by <= 570
    assert names[-1] == "benchmarks" and set(steps[-1].after) == set(names[:-1])
    assert all(step.ends_by <= 570 - steps[-1].seconds for step in steps[:-1])
    assert ("tests-slow" in names) == ("cpp-racecheck" in names) == (not quick)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_one_line_where_there_is_no_gpu(tmp_path: Path) -> None:
    output = tmp_path / "results"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--output", str(output)], capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stdout == "" and not output.exists()
    assert done.stderr.startswith(
        "gpu-check: there is no GPU to check on: torch.cuda.is_available() is False"
    )
    assert done.stderr.count("\n") == 1


def test_one_line_where_there_is_no_such_python() -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--python", "no-such-python"], capture_output=True, text=True
    )
    assert done.returncode == 2 and "no-such-python" in done.stderr and done.stderr.count("\n") == 1


def test_commit(check: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVIT_COMMIT", "abc123")
    assert check.commit() == "abc123"
    monkeypatch.delenv("EVIT_COMMIT")
    monkeypatch.setattr(check, "output_of", lambda *command: "")
    assert check.commit() == "unknown"
    monkeypatch.setattr(check, "output_of", lambda *command: "0123" if "rev-parse" in command else " M a")
    assert check.commit() == "0123 with changes"
