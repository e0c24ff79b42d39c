"""scripts/gpu-bench.py: which benchmarks run, in what time, and on which build; nothing here needs a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "scripts"
if not SCRIPTS.exists():
    pytest.skip("tests run without the source tree", allow_module_level=True)
sys.path.insert(0, str(SCRIPTS))

from gpu_check import bench, facts, paths  # noqa: E402
from gpu_check.outcomes import measured_summary  # noqa: E402
from gpu_check.runner import Runner, Step  # noqa: E402

FACTS: dict[str, Any] = {
    "gpu": "NVIDIA Example 9000",
    "capability": "9.0",
    "commit": "unknown",
    "torch": "2.11.0+cu130",
}
FACTS |= {"cores": 16, "memory_gib": 140.0}
SCRIPT = SCRIPTS / "gpu-bench.py"


def minutes_of(step: Step) -> float:
    (command,) = step.commands
    return float(command[command.index("--minutes") + 1])


@pytest.mark.parametrize("build", [False, True])
@pytest.mark.parametrize(
    "names", [("end-to-end", "growth"), ("counters", "training"), tuple(bench.BENCHMARKS)]
)
def test_everything_fits_into_the_time(
    names: tuple[str, ...], build: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "cuda_tool", lambda name: f"/usr/bin/{name}")
    steps = bench.bench_plan(FACTS, "python3", tmp_path, 570.0, names, build)
    assert [step.name for step in steps] == (["build", "package"] if build else []) + list(names)
    measured = steps[2:] if build else steps
    for number, step in enumerate(steps):
        assert not step.missing and step.ends_by <= 570
        if step in measured:  # one after another, and on a build that was found to be right
            assert set(step.after) == {earlier.name for earlier in steps[:number]}
            assert step.needs == (("package",) if build else ())
            assert 60 * minutes_of(step) < step.seconds
    assert sum(step.seconds for step in measured) + (bench.BUILD_SECONDS if build else 0) <= 571
    shares = {minutes_of(step) / bench.BENCHMARKS[step.name].minutes for step in measured}
    assert max(shares) - min(shares) < 0.01 and max(shares) <= 1


def test_where_the_build_leaves_no_time_nothing_is_begun(tmp_path: Path) -> None:
    steps = bench.bench_plan(FACTS, sys.executable, tmp_path, 190.0, ("growth",), True)
    assert [step.ends_by for step in steps] == [190.0, 190.0, 0.0]
    passed = (sys.executable, "-c", "")
    quick = [replace(step, commands=(passed,), cwd=tmp_path) for step in steps]
    found = Runner(quick, tmp_path / "logs", dict(os.environ)).run()[-1]
    assert (found.name, found.outcome, found.detail) == ("growth", "not run", "no time left")
    assert not found.fine


def test_what_make_bench_needs_has_most_of_its_time() -> None:
    """Ten minutes are enough for the whole of `make bench` on a GPU, where the build is there already."""
    steps = bench.bench_plan(FACTS, "python3", Path("results"), 570.0, bench.DEFAULT, False)
    assert [round(minutes_of(step), 1) for step in steps] == [6.4, 2.5]
    outputs = [step.commands[0][-1] for step in steps]
    assert outputs == [f"results/{name}-nvidia-example-9000" for name in bench.DEFAULT]


def test_the_scripts_take_what_they_are_given() -> None:
    for benchmark in bench.BENCHMARKS.values():
        text = (ROOT / "benchmarks" / benchmark.script).read_text()
        if "benchmark_options.parser(" in text:
            text += (ROOT / "benchmarks" / "benchmark_options.py").read_text()
        assert all(f'"{option}"' in text for option in ("--minutes", "--output", *benchmark.arguments[::2]))


def test_a_missing_tool_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "cuda_tool", lambda name: "")
    steps = bench.bench_plan(FACTS, "python3", Path("x"), 570.0, tuple(bench.BENCHMARKS), False)
    assert {step.name: step.missing for step in steps if step.missing} == {"counters": "no ncu"}
    # The others have its time.
    without = bench.bench_plan(
        FACTS, "python3", Path("x"), 570.0, ("end-to-end", "growth", "training"), False
    )
    times = {step.name: minutes_of(step) for step in steps}
    assert all(minutes_of(step) == times[step.name] for step in without)


def test_torch_has_all_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "1")
    found = bench.bench_environment(FACTS)
    assert "OMP_NUM_THREADS" not in found and "OMP_WAIT_POLICY" not in found
    assert found["PYTHONPATH"].split(os.pathsep)[0] == str(paths.SITE)


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A source tree, built."""
    root, work = tmp_path / "root", tmp_path / "work"
    for name in ("csrc/a.cpp", "evit_ext/__init__.py", *paths.PACKAGE_FILES[2:]):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    monkeypatch.setattr(paths, "ROOT", root)
    for name in ("SOURCE", "SITE", "CMAKE"):
        monkeypatch.setattr(paths, name, work / name.lower())
    paths.start_afresh()
    (paths.SITE / "evit_ext").mkdir(parents=True)
    (paths.SITE / "evit_ext" / "_C.cpython-312.so").touch()
    return root


def test_a_build_is_used_as_long_as_the_sources_are_the_same(tree: Path) -> None:
    assert paths.built_from_these_sources()
    # What setuptools leaves in the copy, and Python in the tree, does not count.
    (paths.SOURCE / "build").mkdir()
    (paths.SOURCE / "build" / "a.o").touch()
    (tree / "evit_ext" / "__pycache__").mkdir()
    (tree / "evit_ext" / "__pycache__" / "a.pyc").touch()
    (tree / "evit_ext" / "_C.so").touch()
    assert paths.built_from_these_sources()
    (tree / "csrc" / "a.cpp").write_text("other")
    assert not paths.built_from_these_sources()


@pytest.mark.parametrize("change", ["a file more", "a file less", "never finished"])
def test_another_tree_is_built_again(tree: Path, change: str) -> None:
    if change == "a file more":
        (tree / "csrc" / "b.cu").touch()
    elif change == "a file less":
        (tree / "csrc" / "a.cpp").unlink()
    else:
        (paths.SITE / "evit_ext" / "_C.cpython-312.so").unlink()
    assert not paths.built_from_these_sources()


def test_a_build_for_another_torch_is_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bench, "built_from_these_sources", lambda: True)
    monkeypatch.setattr(bench, "WORK", tmp_path)
    for said, needed in (("2.11.0+cu130", False), ("2.10.0+cu130", True)):
        monkeypatch.setattr(bench, "PACKAGE", f"print({{'built_with_torch': '{said}'}})")
        assert bench.needs_build(sys.executable, FACTS) == needed
    monkeypatch.setattr(bench, "PACKAGE", "raise SystemExit(1)")
    assert bench.needs_build(sys.executable, FACTS)
    assert bench.needs_build("no-such-python", FACTS)


def test_summaries_of_what_has_no_targets() -> None:
    log = "| table |\nLeft out: 577 tokens: no time\nin 0:02:10\n"
    assert measured_summary(log) == ("passed", "in 0:02:10; left out for want of time: 1")
    assert measured_summary("in 0:00:09") == ("passed", "in 0:00:09")
    assert measured_summary("Traceback\nRuntimeError: no") == ("failed", "RuntimeError: no")


def test_nsight_compute_is_found_in_its_own_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    (tmp_path / "bin").mkdir()
    tool = tmp_path / "bin" / "ncu-stand-in"
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    assert facts.cuda_tool("ncu-stand-in") == str(tool) and facts.cuda_tool("no-such-tool") == ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_one_line_where_there_is_no_gpu(tmp_path: Path) -> None:
    output = tmp_path / "results"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--output", str(output)], capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stdout == "" and not output.exists()
    assert done.stderr.startswith("gpu-bench: there is no GPU to measure: torch.cuda.is_available() is False")
    assert done.stderr.count("\n") == 1
    done = subprocess.run([sys.executable, str(SCRIPT), "--only", "all"], capture_output=True, text=True)
    assert done.returncode == 2 and "invalid choice: 'all'" in done.stderr
