"""scripts/gpu-check.py with a stand-in for the GPU: nothing it does may hide a failure."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "gpu-check.py"
if not SCRIPT.exists():
    pytest.skip("tests run without the source tree", allow_module_level=True)

MACHINE = {"gpu": "NVIDIA Example 9000", "capability": "9.0", "memory_gib": 140.0, "cores": 2}


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in ("WORK", "SITE", "SOURCE"):
        monkeypatch.setattr(module, name, tmp_path / "work" / name.lower())
    module.WORK.mkdir(parents=True)
    return module


def run(script: ModuleType, monkeypatch: pytest.MonkeyPatch, output: Path, *steps: tuple) -> tuple[int, dict]:
    """The exit status and the summary of a run of these steps in the place of the real ones."""
    monkeypatch.setattr(script, "MACHINE", f"print('''{json.dumps(MACHINE)}''')")
    monkeypatch.setattr(script, "build_steps", lambda machine: [script.Step(*step) for step in steps])
    monkeypatch.setattr(
        script, "test_steps", lambda: [script.Step("tests", "echo 3 passed", 9, r"\d passed")]
    )
    monkeypatch.setattr(script, "benchmark_steps", lambda stem, left: [])
    monkeypatch.setattr(script, "pytest", lambda *_: "echo 1 passed")
    monkeypatch.setattr(sys, "argv", ["gpu-check.py", "--output", str(output)])
    monkeypatch.setattr(script.signal, "signal", lambda *_: None)
    status = script.main()
    return status, json.loads((output / "gpu-check-nvidia-example-9000.json").read_text())


def test_what_became_of_each_step(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A failure stops nothing else, what is not there is skipped, and what hangs is ended."""
    child = "trap '' TERM; (trap '' TERM; sleep 60) & echo $!; wait"
    steps = [("build", "echo ready", 9), ("broken", "echo 'a | b'; exit 3", 9), ("hangs", child, 1)]
    steps += [("no-tool", "no-such-program", 9), ("empty", "echo 4 skipped", 9, r"\d passed")]
    started = time.monotonic()
    status, summary = run(script, monkeypatch, tmp_path, *steps)
    assert status == 1 and time.monotonic() - started < 30
    outcomes = {name: step["outcome"] for name, step in summary["steps"].items()}
    fine = {"build": "passed", "tests": "passed", "cuda-large": "passed", "no-tool": "skipped"}
    assert outcomes == {**fine, "broken": "failed", "hangs": "timed out", "empty": "failed"}
    assert set(summary["state"].removeprefix("not passed: ").split(", ")) == {"broken", "hangs", "empty"}
    assert summary["steps"]["broken"]["detail"] == "status 3: a | b"
    text = (tmp_path / "gpu-check-nvidia-example-9000.md").read_text()
    assert "| broken | failed | 0 | status 3: a \\| b |" in text and "- gpu: NVIDIA Example 9000\n" in text
    log = (tmp_path / "gpu-check-nvidia-example-9000.logs" / "hangs.log").read_text()
    state = Path(f"/proc/{log.split()[-1]}/status")
    assert not state.exists() or "\tZ" in state.read_text()


def test_what_needs_a_broken_build_is_not_run(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    status, summary = run(script, monkeypatch, tmp_path, ("build", "exit 1", 9))
    assert status == 1
    assert summary["steps"]["cuda-large"] == {"outcome": "not run", "seconds": 0, "detail": "needs build"}


def test_the_real_steps(script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Built for this GPU alone, whatever a container asks for; a process for each file of tests."""
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.5 8.0 8.6 9.0 10.0 12.0+PTX")
    monkeypatch.setenv("MAX_JOBS", "3")
    settings = script.environment({**MACHINE, "commit": "abc"})
    assert (settings["TORCH_CUDA_ARCH_LIST"], settings["MAX_JOBS"]) == ("9.0", "3")
    assert settings["PYTHONPATH"].split(":")[0] == str(script.SITE)
    names = [step.name for step in script.build_steps(MACHINE)]
    assert (script.SOURCE / "csrc" / "build.json").exists() and not list(script.SOURCE.rglob("*.so"))
    tests = script.test_steps()
    names_of_tests = {step.name for step in tests}
    assert len(names_of_tests) == len(tests) > 25
    assert {
        "ops-test_class_attention",
        "cuda-test_cuda_models",
        "cpp-racecheck-reorganize_agrees",
    } <= names_of_tests
    assert "cuda-test_cuda_large" not in names_of_tests  # all of its tests are slow
    benchmarks = script.benchmark_steps(tmp_path / "gpu-check-example", 240.0)
    assert (
        sum(step.seconds for step in benchmarks[:-1]) <= 0.95 * 240.0
        and "--minutes 1.5" in benchmarks[0].command
    )
    names_of_cpp_tests = "".join(path.read_text() for path in SCRIPT.parents[1].glob("csrc/tests/test_cuda*"))
    assert all(f"TEST({name}" in names_of_cpp_tests for name in script.SANITIZED)
    assert all(Path(step.command.split()[1]).exists() for step in benchmarks)
    assert {step.needs for step in [*tests, *benchmarks]} <= set(names)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_one_line_where_there_is_no_gpu(tmp_path: Path) -> None:
    output = tmp_path / "results"
    done = subprocess.run([sys.executable, SCRIPT, "--output", output], capture_output=True, text=True)
    assert (done.returncode, done.stdout, output.exists()) == (2, "", False)
    assert done.stderr.startswith("gpu-check: there is no GPU to check on: ") and done.stderr.count("\n") == 1


def test_programs_that_are_not_there_or_say_nothing(script: ModuleType) -> None:
    assert script.output_of("no-such-program")[0] == 1
    assert script.output_of("bash", "-c", "kill -9 $$") == (-9, "status -9, and not a word")
    assert script.output_of("bash", "-c", "echo a; echo b; echo c >&2") == (0, "b")
    assert script.output_of("bash", "-c", "echo a; echo b >&2; exit 3") == (3, "b")
