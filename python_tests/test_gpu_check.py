"""The GPU check's own logic, with commands that need no GPU: nothing it does may hide a result."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
if not SCRIPTS.exists():
    pytest.skip("tests run without the source tree", allow_module_level=True)
sys.path.insert(0, str(SCRIPTS))

from gpu_check import facts, paths  # noqa: E402
from gpu_check.outcomes import Result, benchmark_summary, pytest_summary, sanitizer_summary  # noqa: E402
from gpu_check.report import verdict, write_summary  # noqa: E402
from gpu_check.runner import Runner, Step  # noqa: E402
from gpu_check.steps import cpp_steps, environment, plan  # noqa: E402

SCRIPT = SCRIPTS / "gpu-check.py"
FACTS = {"gpu": "NVIDIA Example 9000", "capability": "9.0", "commit": "unknown"}


def python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code)


def run(steps: list[Step], logs: Path, **arguments: Any) -> dict[str, Result]:
    runner = Runner(steps, logs, dict(os.environ), **arguments)
    return {result.name: result for result in runner.run()}


def test_a_failing_step_stops_only_those_that_need_it(tmp_path: Path) -> None:
    steps = [
        Step("build", (python("print('broken'); raise SystemExit(3)"),), 30, 60),
        Step("needs-build", (python(""),), 30, 60, needs=("build",)),
        Step("after-build", (python("print('fine')"),), 30, 60, after=("build",)),
        Step("other", (python("print('first')"), python("print('second')")), 30, 60),
        Step("no-program", (("no-such-program",),), 30, 60),
        Step("last", (python(""),), 30, 60, after=("build", "needs-build", "no-program")),
    ]
    results = run(steps, tmp_path)
    assert list(results) == [step.name for step in steps]
    assert (results["build"].outcome, results["build"].detail) == ("failed", "exit code 3; broken")
    assert (results["needs-build"].outcome, results["needs-build"].detail) == ("not run", "needs: build")
    assert not results["needs-build"].fine
    assert results["after-build"].outcome == results["other"].outcome == results["last"].outcome == "passed"
    assert results["other"].detail == "second"
    assert "first\n$ " in (tmp_path / "other.log").read_text()
    assert results["no-program"].outcome == "failed" and "no-such-program" in results["no-program"].detail
    assert verdict(list(results.values()), 6) == (
        "3 of 6 steps passed; not passed: build, needs-build, no-program"
    )


def test_the_first_command_that_fails_ends_the_step(tmp_path: Path) -> None:
    steps = [Step("two", (python("raise SystemExit(1)"), python("print('second')")), 30, 60)]
    assert run(steps, tmp_path)["two"].outcome == "failed"
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


def test_a_step_is_ended_at_its_limit_with_its_children(tmp_path: Path) -> None:
    child = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    code = (
        "import subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, '-c', {child!r}])\n"
        "print('child', child.pid, flush=True)\n"
        "time.sleep(60)"
    )
    start = time.monotonic()
    result = run([Step("hangs", (python(code),), 3.0, 60)], tmp_path)["hangs"]
    assert time.monotonic() - start < 20
    assert result.outcome == "timed out" and not result.fine
    assert result.detail.startswith("after 3 s; last line: child")
    assert gone_within(5.0, result.detail.split()[-1])


def test_a_process_that_ignores_being_ended(tmp_path: Path) -> None:
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    assert run([Step("deaf", (python(code),), 1.5, 60)], tmp_path)["deaf"].outcome == "timed out"


def test_no_time_left(tmp_path: Path) -> None:
    result = run([Step("late", (python(""),), 30, 0.0)], tmp_path)["late"]
    assert (result.outcome, result.detail, result.fine) == ("not run", "no time left", False)


def test_a_missing_tool_is_a_reason_not_a_failure(tmp_path: Path) -> None:
    steps = [
        Step("cpp-build", (python(""),), 30, 60, missing="no cmake"),
        Step("cpp-tests", (python(""),), 30, 60, needs=("cpp-build",)),
        Step("fine", (python(""),), 30, 60),
    ]
    results = run(steps, tmp_path)
    assert (results["cpp-build"].outcome, results["cpp-build"].detail) == ("not run", "no cmake")
    assert all(result.fine for result in results.values())
    sentence = verdict(list(results.values()), 3)
    assert sentence == "1 of 3 steps passed; not run for want of a tool: cpp-build, cpp-tests"


def test_a_mistake_in_a_judge_fails_its_step(tmp_path: Path) -> None:
    def judge(log: str) -> tuple[str, str]:
        raise KeyError("nothing")

    steps = [Step("judged", (python(""),), 30, 60, judge=judge), Step("other", (), 30, 60)]
    results = run(steps, tmp_path)
    assert (results["judged"].outcome, results["judged"].detail) == ("failed", "KeyError: 'nothing'")
    assert results["other"].outcome == "passed"


def test_interrupting(tmp_path: Path) -> None:
    steps = [
        Step("runs", (python("import time; time.sleep(60)"),), 60, 90),
        Step("next", (python(""),), 30, 60, after=("runs",)),
    ]
    runner = Runner(steps, tmp_path, dict(os.environ))
    threading.Timer(1.5, runner.interrupt).start()
    first, second = runner.run()
    assert first.outcome == "failed" and f"exit code {-signal.SIGTERM}" in first.detail
    assert (second.outcome, second.detail) == ("not run", "interrupted")


def test_the_summary_is_written_after_every_step(tmp_path: Path) -> None:
    stem = tmp_path / "gpu-check-example"
    seen = []

    def write(results: list[Result]) -> None:
        write_summary(stem, FACTS, results, 2)
        seen.append(json.loads(stem.with_suffix(".json").read_text()))

    steps = [
        Step("one", (python("print('a | b')"),), 30, 60),
        Step("two", (python("raise SystemExit(1)"),), 30, 60, after=("one",)),
    ]
    run(steps, tmp_path, on_result=write)
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
def test_summaries_of_pytest(log: str, expected: tuple[str, str]) -> None:
    """Failed tests are told by the exit code."""
    assert pytest_summary(log) == expected


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
def test_summaries_of_compute_sanitizer(log: str, outcome: str) -> None:
    assert sanitizer_summary(log)[0] == outcome


def test_an_unsupported_sanitizer_is_excused_whatever_its_exit_code(tmp_path: Path) -> None:
    command = python("print('Device not supported'); raise SystemExit(1)")
    step = Step("memcheck", (command,), 30, 60, judge=sanitizer_summary)
    result = run([step], tmp_path)["memcheck"]
    assert result.outcome == "not run" and result.fine


def test_a_benchmark_without_a_verdict_failed() -> None:
    text = "| table |\ntargets met: 3 of 4; missed: one\n"
    assert benchmark_summary(text) == ("passed", "targets met: 3 of 4; missed: one")
    assert benchmark_summary("AssertionError: differs") == ("failed", "AssertionError: differs")


@pytest.mark.parametrize("quick", [False, True])
def test_plan(tmp_path: Path, quick: bool) -> None:
    """Every step can come to run, and in time; the benchmarks are alone."""
    steps = plan(FACTS, "python3", tmp_path, 570.0, quick)
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


def test_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVIT_COMMIT", "abc123")
    assert facts.commit() == "abc123"
    monkeypatch.delenv("EVIT_COMMIT")
    monkeypatch.setattr(facts, "output_of", lambda *command: "")
    assert facts.commit() == "unknown"
    monkeypatch.setattr(facts, "output_of", lambda *command: "0123" if "rev-parse" in command else " M a")
    assert facts.commit() == "0123 with changes"


def test_what_a_missing_package_leaves_out_is_in_the_summary(tmp_path: Path) -> None:
    without = {**FACTS, "expecttest": "not installed"}
    for machine, sentence in (
        (without, "1 of 1 steps passed; not tested: torch.library.opcheck on the operators "),
        ({**FACTS, "expecttest": "0.3.0"}, "1 of 1 steps passed"),
    ):
        write_summary(tmp_path / "summary", machine, [Result("tests", "passed", 1.0, "")], 1)
        written = json.loads((tmp_path / "summary.json").read_text())
        text = (tmp_path / "summary.md").read_text()
        assert written["verdict"].startswith(sentence) and f"\n{written['verdict']}\n" in text
        assert bool(written["not_tested"]) == ("not tested" in text) == (machine is without)


def test_builds_for_this_gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.5 8.0 8.6 9.0 10.0 12.0+PTX")  # as containers have it
    assert environment(FACTS)["TORCH_CUDA_ARCH_LIST"] == "9.0"


def test_only_initcheck_sees_memory_that_nothing_has_filled() -> None:
    steps = cpp_steps(FACTS, 300.0, quick=False)
    setting = "EVIT_TEST_NO_POISON=1"
    assert [step.name for step in steps if any(setting in command for command in step.commands)] == [
        "cpp-initcheck"
    ]


def test_the_package_is_built_from_its_sources_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an earlier build has left in the source tree may be for another Python or torch."""
    root, work = tmp_path / "root", tmp_path / "work"
    for name in ("csrc/a.cpp", "csrc/cuda/b.cu", "evit_ext/_C.so", "evit_ext/__init__.py", "build/lib/c.py"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    for name in paths.PACKAGE_FILES:
        if "." in name or name == "LICENSE":
            (root / name).touch()
    monkeypatch.setattr(paths, "ROOT", root)
    for name in ("SOURCE", "SITE", "CMAKE"):
        folder = work / name.lower()
        monkeypatch.setattr(paths, name, folder)
        folder.mkdir(parents=True)
        (folder / "stale").touch()
    paths.start_afresh()
    copied = {str(path.relative_to(work)) for path in work.rglob("*") if path.is_file()}
    files = {name for name in paths.PACKAGE_FILES if (root / name).is_file()}
    files |= {"csrc/a.cpp", "csrc/cuda/b.cu", "evit_ext/__init__.py"}
    assert copied == {f"source/{name}" for name in files}
    build = next(step for step in plan(FACTS, "python3", tmp_path, 570.0, False) if step.name == "build")
    assert build.commands[0][-1] == str(paths.WORK / "source")
