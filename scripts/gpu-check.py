#!/usr/bin/env python3
"""Build, test and time the package on the GPU of this machine, in nine minutes and without a network.

    python scripts/gpu-check.py

Uses the Python it is started with, which needs torch for CUDA, timm, setuptools, pybind11, ninja, pytest and
hypothesis; cmake and compute-sanitizer are used if they are found. The package is built into build/gpu-check
and installed nowhere else. Every step has a time limit, and one that fails stops only those that need it.

Writes gpu-check-GPU.json and .md to the output folder, after every step, each step's log to
gpu-check-GPU.logs/, and the results of the benchmarks. Exit status: 0 nothing failed, 1 something did,
2 there is no GPU. If the source came without its git history, set EVIT_COMMIT to the commit.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "build" / "gpu-check"
SITE, SOURCE = WORK / "site", WORK / "source"
TESTS, BENCHMARKS = ROOT / "python_tests", ROOT / "benchmarks"

# Run in processes of their own, so that this one holds no memory of the GPU.
MACHINE = """
import json, os, platform, timm, torch
gpu = torch.cuda.get_device_properties(0)
print(json.dumps({"gpu": gpu.name, "capability": f"{gpu.major}.{gpu.minor}",
    "memory_gib": round(gpu.total_memory / 2**30, 1), "cores": len(os.sched_getaffinity(0)),
    "torch": torch.__version__, "torch_cuda": torch.version.cuda, "timm": timm.__version__,
    "python": platform.python_version()}))
"""
# Of the C++ tests, those that run under compute-sanitizer, a process each: all kernels, in seconds.
SANITIZED = (
    "cuda_class_attention_agrees",
    "cuda_class_attention_gradients",
    "cuda_attention_with_scores_agrees",
    "cuda_mean_attention_agrees",
    "cuda_reorganize_agrees",
    "cuda_norms_agree",
    "cuda_gather_and_scatter",
    "cuda_fuse_agrees",
    "cuda_restore_agrees",
)
SELF_TEST = """
from evit_ext import _C
message = _C.cuda_self_test(0)
assert message == "", message
print(_C.build_info())
"""


class Step(NamedTuple):
    """A command, its limit in seconds, what a line of its log must have, and a step that must have passed."""

    name: str
    command: str
    seconds: float
    expect: str = "."
    needs: str = ""


class Check:
    """Runs steps and writes what became of them to STEM.json, STEM.md and STEM.logs/."""

    def __init__(self, stem: Path, machine: dict[str, Any], ends: float) -> None:
        self.stem, self.machine, self.logs = stem, machine, stem.with_suffix(".logs")
        self.ends = ends
        self.environment = environment(machine)
        self.results: dict[str, dict[str, Any]] = {}
        self.running: set[subprocess.Popen[bytes]] = set()
        self.interrupted = False
        shutil.rmtree(self.logs, ignore_errors=True)
        self.logs.mkdir(parents=True)

    def left(self) -> float:
        return max(0.0, self.ends - time.monotonic())

    def run(self, steps: list[Step], at_once: int = 1, reserve: float = 0.0) -> None:
        """Run the steps, `at_once` at a time; none goes on when only `reserve` seconds are left."""
        with ThreadPoolExecutor(at_once) as pool:
            futures = {pool.submit(self.result, step, reserve): step.name for step in steps}
            for future in as_completed(futures):
                name = futures[future]
                self.results[name] = future.result()
                self.write("not finished")
                print(f"{name}: {self.results[name]}", flush=True)

    def result(self, step: Step, reserve: float) -> dict[str, Any]:
        start, seconds = time.monotonic(), min(step.seconds, self.left() - reserve)
        needed = self.results[step.needs]["outcome"] if step.needs else "passed"
        if needed != "passed":
            outcome, detail = needed if needed == "skipped" else "not run", f"needs {step.needs}"
        elif self.interrupted or seconds <= 0:
            outcome, detail = "not run", "interrupted" if self.interrupted else "no time left"
        else:
            outcome, detail = self.execute(step, seconds)
        return {"outcome": outcome, "seconds": round(time.monotonic() - start), "detail": detail}

    def execute(self, step: Step, seconds: float) -> tuple[str, str]:
        path, command = self.logs / f"{step.name}.log", ["bash", "-c", step.command]
        path.write_text(f"$ {step.command}\n")
        with path.open("ab") as log:
            streams: Any = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
            process = subprocess.Popen(
                command, cwd=WORK, env=self.environment, start_new_session=True, **streams
            )
            self.running.add(process)
            try:
                status = process.wait(seconds)
            except subprocess.TimeoutExpired:
                status = 124
            end(process)
            self.running.discard(process)
        lines = [line.strip() for line in path.read_text(errors="replace").splitlines() if line.strip()]
        found = [line for line in lines if re.search(step.expect, line)]
        if status == 127:  # a program is not there
            return "skipped", lines[-1]
        if "compute-sanitizer" in step.command and any("Device not supported" in line for line in lines):
            return "skipped", "compute-sanitizer does not support this GPU"
        if status == 124:
            return "timed out", f"after {seconds:.0f} s: {lines[-1]}"
        return ("passed", found[-1]) if status == 0 and found else ("failed", f"status {status}: {lines[-1]}")

    def write(self, state: str) -> None:
        contents = {"state": state, "machine": self.machine, "steps": self.results}
        lines = [f"# GPU check: {state}\n", *(f"- {name}: {fact}" for name, fact in self.machine.items())]
        lines += ["\n| step | outcome | seconds | detail |", "|---|---|---|---|"]
        for name, result in self.results.items():
            cells = [str(cell).replace("|", "\\|") for cell in (name, *result.values())]
            lines.append(f"| {' | '.join(cells)} |")
        self.stem.with_suffix(".json").write_text(json.dumps(contents, indent=1) + "\n")
        self.stem.with_suffix(".md").write_text("\n".join(lines) + "\n")

    def interrupt(self, *_: object) -> None:
        self.interrupted = True
        for process in list(self.running):
            end(process)


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process and what it has started, by force what does not end by itself."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(3)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            pass


def environment(machine: dict[str, Any]) -> dict[str, str]:
    homes = filter(None, [os.environ.get("CUDA_HOME"), "/usr/local/cuda"])
    tools = [f"{home}/{folder}" for home in homes for folder in ("bin", "compute-sanitizer")]
    return {
        # What else is installed there has no say in the tests.
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        # By itself the build goes by free memory, of which a virtual machine shows little.
        "MAX_JOBS": str(machine["cores"]),
        **os.environ,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"], *tools]),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(SITE), os.environ.get("PYTHONPATH")])),
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": "2",
        "FORCE_CUDA": "1",
        # Also if one is set: containers come with a list of all architectures, which take minutes each.
        "TORCH_CUDA_ARCH_LIST": machine["capability"],
        "EVIT_COMMIT": machine["commit"],
    }


def python(*arguments: object) -> str:
    return shlex.join([sys.executable, *map(str, arguments)])


def pytest(*arguments: object) -> str:
    # From another folder: in the source tree, evit_ext would be imported from there, without its module.
    settings = ("-c", ROOT / "pyproject.toml", "--rootdir", ROOT, "-p", "no:cacheprovider")
    report = ("-v", "--tb=short", "-o", "faulthandler_timeout=120")
    command = python("-m", "pytest", *settings, *report, "--devices", "cuda", *arguments)
    # Several files run at once, and by itself each would compile with as many processes as there are cores.
    return f"TORCHINDUCTOR_COMPILE_THREADS=2 {command}"


def build_steps(machine: dict[str, Any]) -> list[Step]:
    """From a copy: setuptools takes what lies in build/ as up to date, whatever torch it was made for."""
    shutil.rmtree(WORK, ignore_errors=True)
    SOURCE.mkdir(parents=True)
    for name in ("csrc", "evit_ext", "LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py"):
        subprocess.run(["cp", "-r", ROOT / name, SOURCE], check=True)
    for module in SOURCE.glob("evit_ext/*.so"):
        module.unlink()
    options = ("-v", "--no-index", "--no-build-isolation", "--no-deps", "--no-cache-dir", "--target", SITE)
    package = f"{python('-m', 'pip', 'install', *options, SOURCE)} && {python('-c', SELF_TEST)}"
    cpp = f"""cmake -S ../.. -B cpp -G Ninja -DEVIT_CUDA=ON -DEVIT_LIBRARY=OFF \\
        -DCMAKE_CUDA_ARCHITECTURES={machine["capability"].replace(".", "")} &&
        cmake --build cpp --target evit_cuda_tests"""
    return [Step("build", package, 300), Step("cpp-build", cpp, 300)]


def test_steps() -> list[Step]:
    """The C++ tests, the Python tests that take a device, and C++ tests under compute-sanitizer.

    Each file has its own process: a kernel that accesses memory out of bounds makes the GPU unusable for
    all that follows in the same process.
    """
    steps = [Step("cpp-tests", "cpp/evit_cuda_tests", 90, needs="cpp-build")]
    for path in sorted(TESTS.rglob("test_*.py")):
        text = path.read_text()
        takes_device = path.parent.name == "cuda" or re.search(r"\bdevice: torch\.device\b", text)
        if takes_device and "pytestmark = pytest.mark.slow" not in text:
            name = "-".join(path.relative_to(TESTS).with_suffix("").parts)
            steps.append(Step(name, pytest(path), 240, r"\d passed", "build"))
    for tool in ("memcheck", "racecheck", "initcheck", "synccheck"):
        # Without the setting, the tests fill all memory they allocate, and initcheck has nothing to find.
        setting = "EVIT_TEST_NO_POISON=1 " if tool == "initcheck" else ""
        for test in SANITIZED:
            command = (
                f"{setting}compute-sanitizer --tool {tool} --error-exitcode 1 cpp/evit_cuda_tests {test}"
            )
            name = f"cpp-{tool}-{test.removeprefix('cuda_')}"
            steps.append(Step(name, command, 90, "SUMMARY: 0 (errors|hazards)", "cpp-build"))
    return steps


def benchmark_steps(stem: Path, seconds: float) -> list[Step]:
    """The benchmarks, the most telling first, in so many seconds.

    They stop by themselves before their step's limit, but for the last, which gets what the others leave.
    """

    def benchmark(name: str, share: float, script: str, *arguments: object) -> Step:
        output = stem.with_name(stem.name.replace("gpu-check", name))
        command = python(BENCHMARKS / script, "--device", "cuda", "--output", output, *arguments)
        return Step(name, command, share * seconds, needs="build")

    def end_to_end(name: str, share: float, *arguments: object) -> Step:
        minutes = max(
            0.1, round((share * seconds - 30) / 60, 2)
        )  # what precedes its clock takes seconds, too
        return benchmark(name, share, "end_to_end.py", "--minutes", minutes, *arguments)

    return [
        end_to_end("end-to-end", 0.5),
        benchmark("operators", 0.27, "operators.py", "--limit", max(5, round(0.27 * seconds - 15))),
        end_to_end("end-to-end-base", 0.18, "--model", "base", "--quick", "--batch", 256),
        benchmark("training-steps", 0.5, "training_steps.py", "--rounds", 5),
    ]


def output_of(*command: str, folder: Path = ROOT) -> tuple[int, str]:
    """The exit status and the last line that a program prints; 1 and why where it does not run or hangs."""
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=90)
    except (OSError, subprocess.TimeoutExpired) as error:
        return 1, str(error)
    lines = (done.stderr if done.returncode else done.stdout).strip().splitlines()
    return done.returncode, lines[-1] if lines else f"status {done.returncode}, and not a word"


def main() -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--output", type=Path, default=BENCHMARKS / "results", help="(default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything (default: 9)")
    options = parser.parse_args()
    ends = time.monotonic() + 60 * options.minutes
    status, said = output_of(sys.executable, "-c", MACHINE, folder=Path("/"))
    if status != 0:
        print(f"gpu-check: there is no GPU to check on: {said}", file=sys.stderr)
        return 2
    machine = json.loads(said)
    status, said = output_of("git", "describe", "--always", "--abbrev=40", "--dirty")
    machine["commit"] = os.environ.get("EVIT_COMMIT") or (said if status == 0 else "unknown")
    gpu = re.sub(r"[^a-z0-9]+", "-", machine["gpu"].lower()).strip("-")
    check = Check(options.output.resolve() / f"gpu-check-{gpu}", machine, ends)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, check.interrupt)
    reserve = 0.45 * check.left()  # for the benchmarks
    check.run(build_steps(machine), 2, reserve)
    check.run(test_steps(), max(1, min(machine["cores"], int(machine["memory_gib"] / 2))), reserve)
    large = pytest("-m", "slow", TESTS / "cuda")  # alone: it needs much of the GPU's memory
    check.run([Step("cuda-large", large, 90, r"\d passed", "build")], 1, reserve)
    check.run(benchmark_steps(check.stem, check.left()))
    fine = ("passed", "skipped")
    failed = [name for name, result in check.results.items() if result["outcome"] not in fine]
    state = f"not passed: {', '.join(failed)}" if failed else "nothing failed"
    check.write(state)
    print(f"{state}\n{check.stem}.md, .json, .logs/")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
