#!/usr/bin/env python3
"""Check and measure everything on the GPU that is there: build, tests, sanitizers, benchmarks.

    scripts/gpu-check.py --output benchmarks/results

Uses the Python it is started with (or --python), which must have torch with CUDA, timm, pytest, hypothesis,
ninja, pybind11 and setuptools; makes no environment, needs no network and installs nothing but into
build/gpu-check. Every step has a time limit and a log of its own, and a step that fails stops only those that
need what it makes. Steps that do not need each other run at the same time; the benchmarks run last, alone.

Writes gpu-check-GPU.json, gpu-check-GPU.md and the logs in gpu-check-GPU.logs/ to the output folder, after
every step again. Exit code: 0 all passed, 1 something did not, 2 there is no GPU. The commit is what git says
or, where the source came without its history, the environment variable EVIT_COMMIT.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "build" / "gpu-check"
SITE = WORK / "site"
CMAKE = WORK / "cmake"

PASSED, FAILED, TIMED_OUT, NOT_RUN = "passed", "failed", "timed out", "not run"

#: From the log of a step, what became of it and what it says in short. PASSED needs exit code 0 as well.
Judge = Callable[[str], tuple[str, str]]


def last_line(log: str) -> tuple[str, str]:
    """Any log will do; the last line that says something."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return PASSED, lines[-1] if lines else "no output"


def pytest_summary(log: str) -> tuple[str, str]:
    """At least one test must have passed: a run in which all are skipped checks nothing."""
    found = re.findall(r"^=+ (.*\b(?:passed|failed|skipped|errors?|deselected)\b.*) in [\d.]+s", log, re.M)
    stopped = re.search(r"!+ (.+ lost the CUDA context.*?) !+", log)
    summary = found[-1] if found else f"no summary; last line: {last_line(log)[1]}"
    return (
        PASSED if re.search(r"\d passed", summary) else FAILED,
        f"{summary}; {stopped[1]}" if stopped else summary,
    )


def sanitizer_summary(log: str) -> tuple[str, str]:
    """There must be a summary, and it must count nothing."""
    if "Device not supported" in log:
        return NOT_RUN, "compute-sanitizer says: Device not supported"
    found = re.findall(r"((?:ERROR|RACECHECK) SUMMARY: (\d+) .*)", log)
    if not found:
        return FAILED, f"no summary; last line: {last_line(log)[1]}"
    return PASSED if all(count == "0" for _, count in found) else FAILED, found[-1][0]


def benchmark_summary(log: str) -> tuple[str, str]:
    """A missed target is a result, not a failure; results that are wrong end the benchmark with an error."""
    found = re.findall(r"^targets met: .*$", log, re.M)
    return PASSED if found else FAILED, found[-1] if found else last_line(log)[1]


@dataclass(frozen=True)
class Step:
    """Something to run, with a limit."""

    name: str
    commands: tuple[tuple[str, ...], ...]
    seconds: float  # the most it may take
    ends_by: float  # and the latest it may end, in seconds from the start of the whole
    needs: tuple[str, ...] = ()  # steps that must have passed before
    after: tuple[str, ...] = ()  # steps that must have ended before, however
    missing: str = ""  # why it cannot be run on this machine, which is no failure
    judge: Judge = last_line
    cwd: Path = ROOT


@dataclass(frozen=True)
class Result:
    """What became of a step."""

    name: str
    outcome: str
    seconds: float
    detail: str
    log: str = ""
    excused: bool = False

    @property
    def fine(self) -> bool:
        return self.outcome == PASSED or self.excused


class Runner:
    """Runs steps at the same time, each as soon as those before it have ended."""

    def __init__(
        self,
        steps: list[Step],
        logs: Path,
        environment: dict[str, str],
        on_result: Callable[[list[Result]], None] = lambda results: None,
    ) -> None:
        self.steps = steps
        self.logs = logs
        self.environment = environment
        self.on_result = on_result
        self.start = time.monotonic()
        self.results: dict[str, Result] = {}
        self._changed = threading.Condition()
        self._processes: set[subprocess.Popen[bytes]] = set()
        self._interrupted = False

    def run(self) -> list[Result]:
        """Run every step; the results come in the order of the steps."""
        self.logs.mkdir(parents=True, exist_ok=True)
        threads = [threading.Thread(target=self._run_step, args=(step,), daemon=True) for step in self.steps]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return self.so_far()

    def so_far(self) -> list[Result]:
        return [self.results[step.name] for step in self.steps if step.name in self.results]

    def interrupt(self) -> None:
        """End what runs and start nothing more."""
        self._interrupted = True
        for process in list(self._processes):
            end(process)

    def _elapsed(self) -> float:
        return time.monotonic() - self.start

    def _run_step(self, step: Step) -> None:
        with self._changed:
            before = {*step.needs, *step.after}
            self._changed.wait_for(lambda: before <= set(self.results))
        try:
            result = self._result(step)
        except Exception as error:  # a mistake in this script must not hide the other steps' results
            result = Result(step.name, FAILED, 0.0, f"{type(error).__name__}: {error}")
        with self._changed:
            self.results[step.name] = result
            print(f"[{self._elapsed():5.0f} s] {describe(result)}", flush=True)
            self.on_result(self.so_far())
            self._changed.notify_all()

    def _result(self, step: Step) -> Result:
        if step.missing:
            return Result(step.name, NOT_RUN, 0.0, step.missing, excused=True)
        failed = [name for name in step.needs if self.results[name].outcome != PASSED]
        if failed:
            # Where what it needs was left out for a reason that is no failure, so is this.
            excused = all(self.results[name].excused for name in failed)
            return Result(step.name, NOT_RUN, 0.0, f"needs: {', '.join(failed)}", excused=excused)
        limit = min(step.seconds, step.ends_by - self._elapsed())
        if self._interrupted or limit <= 0:
            return Result(step.name, NOT_RUN, 0.0, "interrupted" if self._interrupted else "no time left")
        print(f"[{self._elapsed():5.0f} s] {step.name} …", flush=True)
        log_path = self.logs / f"{step.name}.log"
        start = time.monotonic()
        code, timed_out = 0, False
        with log_path.open("wb") as log:
            for command in step.commands:
                log.write(f"$ {shlex.join(command)}\n".encode())
                log.flush()
                code, timed_out = self._execute(step, command, log, start + limit)
                if code != 0:
                    break
        seconds = time.monotonic() - start
        text = log_path.read_text(errors="replace")
        outcome, detail = step.judge(text)
        if timed_out:
            outcome, detail = TIMED_OUT, f"after {limit:.0f} s; last line: {last_line(text)[1]}"
        elif code != 0 and outcome != NOT_RUN:
            outcome, detail = FAILED, f"exit code {code}; {detail}"
        excused = outcome == NOT_RUN
        return Result(step.name, outcome, round(seconds, 1), detail[:300], log_path.name, excused)

    def _execute(self, step: Step, command: tuple[str, ...], log: Any, until: float) -> tuple[int, bool]:
        """Exit code, and whether it was ended at its limit."""
        try:
            process = subprocess.Popen(
                command,
                cwd=step.cwd,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            log.write(f"{command[0]} cannot be run: {error}\n".encode())
            return 127, False
        self._processes.add(process)
        try:
            return process.wait(max(0.0, until - time.monotonic())), False
        except subprocess.TimeoutExpired:
            end(process)
            return process.wait(), True
        finally:
            self._processes.discard(process)


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it has started, by force what does not end by itself."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return
        try:
            process.wait(3.0)
        except subprocess.TimeoutExpired:
            continue


def describe(result: Result) -> str:
    detail = f": {result.detail}" if result.detail else ""
    return f"{result.name} {result.outcome} ({result.seconds:.0f} s){detail}"


def table(results: list[Result]) -> str:
    """The results as a Markdown table."""
    lines = ["| step | outcome | seconds | detail |", "|---|---|---|---|"]
    for result in results:
        detail = result.detail.replace("|", "\\|").replace("\n", " ")
        lines.append(f"| {result.name} | {result.outcome} | {result.seconds:.0f} | {detail} |")
    return "\n".join(lines) + "\n"


def verdict(results: list[Result], count: int) -> str:
    """One sentence; `count` is the number of steps there are."""
    bad = [result.name for result in results if not result.fine]
    left_out = [result.name for result in results if result.excused]
    if len(results) < count:
        return f"not finished: {len(results)} of {count} steps have ended"
    sentence = f"{len(results) - len(bad) - len(left_out)} of {count} steps passed"
    sentence += f"; not run for want of a tool: {', '.join(left_out)}" if left_out else ""
    return sentence + (f"; not passed: {', '.join(bad)}" if bad else "")


def write_summary(stem: Path, facts: dict[str, Any], results: list[Result], count: int) -> None:
    """STEM.json and STEM.md."""
    sentence = verdict(results, count)
    everything = {"machine": facts, "verdict": sentence, "steps": [asdict(result) for result in results]}
    stem.with_suffix(".json").write_text(json.dumps(everything, indent=1) + "\n")
    heading = "".join(f"- {name}: {fact}\n" for name, fact in facts.items())
    stem.with_suffix(".md").write_text(f"# GPU check\n\n{heading}\n{table(results)}\n{sentence}\n")


# Run by the Python that is checked, which need not be the one that runs this script.
FACTS = """
import importlib.metadata, json, platform
import torch

def version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"

facts = {"gpu": None, "python": platform.python_version(), "torch": torch.__version__}
facts["torch_cuda"] = torch.version.cuda
for name in ("timm", "triton", "numpy", "setuptools", "pybind11", "pytest", "hypothesis", "expecttest"):
    facts[name] = version(name)
if torch.cuda.is_available():
    gpu = torch.cuda.get_device_properties(0)
    facts.update(gpu=gpu.name, gpus=torch.cuda.device_count(), capability=f"{gpu.major}.{gpu.minor}",
                 multiprocessors=gpu.multi_processor_count, memory_gib=round(gpu.total_memory / 2**30, 1),
                 l2_mib=round(gpu.L2_cache_size / 2**20, 1))
print("FACTS" + json.dumps(facts))
"""


def output_of(*command: str) -> str:
    """What a command prints, or an empty string where it cannot be run."""
    try:
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return run.stdout.strip() if run.returncode == 0 else ""


def commit() -> str:
    """What is checked: EVIT_COMMIT, else what git says, else "unknown"."""
    if os.environ.get("EVIT_COMMIT"):
        return os.environ["EVIT_COMMIT"]
    head = output_of("git", "rev-parse", "HEAD")
    if not head:
        return "unknown"
    return head + (" with changes" if output_of("git", "status", "--porcelain") else "")


def cuda_tool(name: str) -> str:
    """Path of one of the toolkit's programs, or an empty string."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    folders = ([Path(home)] if home else []) + [Path("/usr/local/cuda")]
    places = [folder / "bin" for folder in folders] + [folder / "compute-sanitizer" for folder in folders]
    search = os.pathsep.join([os.environ.get("PATH", ""), *map(str, places)])
    return shutil.which(name, path=search) or ""


def collect_facts(python: str) -> dict[str, Any]:
    """GPU, versions, commit and command. Raises RuntimeError with one line where there is no GPU."""
    try:
        run = subprocess.run([python, "-c", FACTS], capture_output=True, text=True, timeout=120, cwd="/")
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RuntimeError(f"{python} cannot be asked: {error}") from None
    found = re.search(r"^FACTS(.*)$", run.stdout, re.M)
    if not found:
        raise RuntimeError(f"{python} cannot say: {last_line(run.stderr)[1]}")
    facts: dict[str, Any] = json.loads(found[1])
    if not facts["gpu"]:
        raise RuntimeError(f"torch.cuda.is_available() is False in {python}, torch {facts['torch']}")
    driver = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    facts["driver"] = driver.splitlines()[0] if driver else "nvidia-smi does not say"
    nvcc = cuda_tool("nvcc")
    release = re.search(r"release (.+)", output_of(nvcc, "--version")) if nvcc else None
    facts["nvcc"] = release[1] if release else "not found"
    facts["processor"] = f"{platform.machine()}, {os.cpu_count()} cores"
    facts["commit"] = commit()
    facts["command"] = shlex.join(["scripts/gpu-check.py", *sys.argv[1:]])
    return facts


# Whether the package that is installed is the one with CUDA kernels, and one of them can run.
PACKAGE = """
import sys
import torch, evit_ext
from evit_ext import _C
info = _C.build_info()
print(evit_ext.__file__, info)
assert evit_ext.__file__.startswith(sys.argv[1]), "another evit_ext is installed"
assert info["cuda_operators"], "the build has no CUDA operators"
message = _C.cuda_self_test(0)
assert message == "", message
print("cuda_operators, and the self-test ran; architectures", info["cuda_architectures"])
"""


def pytest_command(python: str, *arguments: str) -> tuple[str, ...]:
    # The settings by name and from another folder: with the source tree as the working directory, `python -m`
    # would import evit_ext from there, where it has no compiled module.
    settings = ("-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT), "-p", "no:cacheprovider")
    # -v so that the log names the test in which a kernel hangs.
    report = ("-v", "-o", "faulthandler_timeout=120", "--durations=10")
    return (python, "-m", "pytest", *settings, *report, "--devices", "cuda", *arguments)


def plan(facts: dict[str, Any], python: str, output: Path, total: float, quick: bool) -> list[Step]:
    """All steps. They run together except the benchmarks, for which the last part of the time is reserved."""
    tests = ROOT / "python_tests"
    reserve = 60.0 if quick else 200.0  # for the benchmarks
    before = total - reserve

    def pytest_step(name: str, seconds: float, *arguments: str, after: tuple[str, ...] = ()) -> Step:
        command = pytest_command(python, *arguments)
        return Step(name, (command,), seconds, before, ("build",), after, judge=pytest_summary, cwd=WORK)

    install = (python, "-m", "pip", "install", "-v", "--no-index", "--no-build-isolation", "--no-deps")
    build = (*install, "--no-cache-dir", "--target", str(SITE), str(ROOT))
    others = ("models", "test_apply.py", "test_block.py", "test_record.py", "test_macs.py")
    steps = [
        Step("build", (build,), 300, before),
        Step("package", ((python, "-c", PACKAGE, str(SITE)),), 60, before, ("build",), cwd=WORK),
        pytest_step("tests-operators", 300, str(tests / "ops")),
        pytest_step("tests-models", 300, *(str(tests / name) for name in others)),
        pytest_step("tests-cuda", 300, str(tests / "cuda")),
    ]
    if not quick:
        # After the other tests of the same folder: it needs much of the GPU's memory.
        slow = ("-m", "slow", str(tests / "cuda"))
        steps.append(pytest_step("tests-slow", 150, *slow, after=("tests-cuda",)))
    steps += cpp_steps(facts, before, quick)
    stem = output / f"operators-{slug_of(facts['gpu'])}"
    benchmark = [python, str(ROOT / "benchmarks" / "operators.py"), "--device", "cuda", "--output", str(stem)]
    # It stops by itself in time, and leaves out what it did not get to.
    benchmark += ["--limit", str(round(reserve * 0.85)), *(["--quick"] if quick else [])]
    everything = tuple(step.name for step in steps)
    steps.append(
        Step("benchmarks", (tuple(benchmark),), reserve, total, ("build",), everything, "", benchmark_summary)
    )
    return steps


def cpp_steps(facts: dict[str, Any], before: float, quick: bool) -> list[Step]:
    """The C++ tests of the CUDA kernels: built, run, and run under each tool of compute-sanitizer."""
    architecture = facts["capability"].replace(".", "")
    configure = ["cmake", "-S", str(ROOT), "-B", str(CMAKE), "-DEVIT_CUDA=ON", "-DEVIT_LIBRARY=OFF"]
    configure += [f"-DCMAKE_CUDA_ARCHITECTURES={architecture}"]
    configure += ["-G", "Ninja"] if shutil.which("ninja") else []
    configure += [f"-DCMAKE_CUDA_COMPILER={cuda_tool('nvcc')}"] if cuda_tool("nvcc") else []
    compile_tests = ("cmake", "--build", str(CMAKE), "--parallel", str(os.cpu_count() or 1))
    no_cmake = "" if shutil.which("cmake") else "no cmake"
    tests = str(CMAKE / "evit_cuda_tests")
    steps = [
        Step("cpp-build", (tuple(configure), compile_tests), 300, before, missing=no_cmake),
        Step("cpp-tests", ((tests,),), 90, before, ("cpp-build",)),
    ]
    sanitizer = cuda_tool("compute-sanitizer")
    no_sanitizer = "" if sanitizer else "no compute-sanitizer"
    needs, after = ("cpp-build",), ("cpp-tests",)
    for tool in ["memcheck"] if quick else ["memcheck", "racecheck", "initcheck", "synccheck"]:
        command = (sanitizer, "--tool", tool, "--error-exitcode", "1", tests)
        steps.append(
            Step(f"cpp-{tool}", (command,), 150, before, needs, after, no_sanitizer, sanitizer_summary)
        )
    return steps


def slug_of(name: str) -> str:
    """A GPU's name as part of a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def environment(facts: dict[str, Any]) -> dict[str, str]:
    """That of every step."""
    cores = os.cpu_count() or 1
    found = {
        **os.environ,
        "PYTHONUNBUFFERED": "1",
        "FORCE_CUDA": "1",
        # Several steps run at once, and the tensors on the CPU are small.
        "OMP_NUM_THREADS": str(max(1, cores // 4)),
        "OMP_WAIT_POLICY": "PASSIVE",
        "EVIT_COMMIT": facts["commit"],
        "PYTHONPATH": os.pathsep.join(filter(None, [str(SITE), os.environ.get("PYTHONPATH", "")])),
    }
    found.setdefault("TORCH_CUDA_ARCH_LIST", facts["capability"])
    nvcc = cuda_tool("nvcc")
    if nvcc:
        found["PATH"] = os.pathsep.join([os.environ.get("PATH", ""), str(Path(nvcc).parent)])
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=ROOT / "benchmarks" / "results",
        metavar="DIR",
        help="folder of the results (default: benchmarks/results)",
    )
    parser.add_argument(
        "--python", default=sys.executable, help="the Python to check with (default: this one)"
    )
    parser.add_argument("--minutes", type=float, default=9.5, help="for everything (default: 9.5)")
    parser.add_argument(
        "--quick", action="store_true", help="one sanitizer, no tests of large tensors, few benchmarks"
    )
    arguments = parser.parse_args()
    began = time.monotonic()
    try:
        facts = collect_facts(arguments.python)
    except RuntimeError as error:
        print(f"gpu-check: there is no GPU to check on: {error}", file=sys.stderr)
        return 2
    output = arguments.output.resolve()
    stem = output / f"gpu-check-{slug_of(facts['gpu'])}"
    logs = stem.with_suffix(".logs")
    # Nothing of an earlier run may pass for a result of this one.
    shutil.rmtree(SITE, ignore_errors=True)
    shutil.rmtree(logs, ignore_errors=True)
    WORK.mkdir(parents=True, exist_ok=True)
    output.mkdir(parents=True, exist_ok=True)
    for name, fact in facts.items():
        print(f"{name}: {fact}")
    # The time that finding the facts took counts as well.
    total = arguments.minutes * 60 - (time.monotonic() - began)
    steps = plan(facts, arguments.python, output, total, arguments.quick)

    def write(results: list[Result]) -> None:
        write_summary(stem, facts, results, len(steps))

    runner = Runner(steps, logs, environment(facts), write)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: runner.interrupt())
    results = runner.run()
    write(results)
    print(f"\n{table(results)}\n{verdict(results, len(steps))}\n{stem}.json, .md, .logs/")
    return 0 if all(result.fine for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
