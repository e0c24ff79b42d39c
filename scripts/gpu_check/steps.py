"""Everything there is to run, and the environment it runs in."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

from .facts import cuda_tool, slug_of
from .outcomes import benchmark_summary, pytest_summary, sanitizer_summary
from .paths import CMAKE, ROOT, SITE, SOURCE, WORK
from .runner import Step

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


def build_steps(python: str, ends_by: float) -> list[Step]:
    """The package, built from its sources without network, and whether it is what was wanted."""
    install = (python, "-m", "pip", "install", "-v", "--no-index", "--no-build-isolation", "--no-deps")
    build = (*install, "--no-cache-dir", "--target", str(SITE), str(SOURCE))
    return [
        Step("build", (build,), 300, ends_by, cwd=WORK),
        Step("package", ((python, "-c", PACKAGE, str(SITE)),), 60, ends_by, ("build",), cwd=WORK),
    ]


def plan(facts: dict[str, Any], python: str, output: Path, total: float, quick: bool) -> list[Step]:
    """All steps. They run together except the benchmarks, for which the last part of the time is reserved."""
    tests = ROOT / "python_tests"
    reserve = 60.0 if quick else 200.0  # for the benchmarks
    before = total - reserve

    def pytest_step(name: str, seconds: float, *arguments: str, after: tuple[str, ...] = ()) -> Step:
        command = pytest_command(python, *arguments)
        return Step(name, (command,), seconds, before, ("build",), after, judge=pytest_summary, cwd=WORK)

    others = ["models", "test_apply.py", "test_block.py", "test_block_at_once.py", "test_record.py"]
    others += ["test_macs.py"]
    steps = [
        *build_steps(python, before),
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
    compile_tests = ["cmake", "--build", str(CMAKE), "--target", "evit_cuda_tests"]
    compile_tests += ["--parallel", str(os.cpu_count() or 1)]
    no_cmake = "" if shutil.which("cmake") else "no cmake"
    tests = str(CMAKE / "evit_cuda_tests")
    steps = [
        Step("cpp-build", (tuple(configure), tuple(compile_tests)), 300, before, missing=no_cmake),
        Step("cpp-tests", ((tests,),), 90, before, ("cpp-build",)),
    ]
    sanitizer = cuda_tool("compute-sanitizer")
    no_sanitizer = "" if sanitizer else "no compute-sanitizer"
    needs, after = ("cpp-build",), ("cpp-tests",)
    for tool in ["memcheck"] if quick else ["memcheck", "racecheck", "initcheck", "synccheck"]:
        command: tuple[str, ...] = (sanitizer, "--tool", tool, "--error-exitcode", "1", tests)
        if tool == "initcheck":
            # The tests otherwise fill what they allocate on the device, and nothing there is uninitialised.
            command = ("env", "EVIT_TEST_NO_POISON=1", *command)
        steps.append(
            Step(f"cpp-{tool}", (command,), 150, before, needs, after, no_sanitizer, sanitizer_summary)
        )
    return steps


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
    # Not the list that a container may come with: it takes six times as long to build.
    found["TORCH_CUDA_ARCH_LIST"] = facts["capability"]
    # ninja lies beside the Python that has it; without it, files are compiled one after another.
    nvcc = cuda_tool("nvcc")
    beside = [str(Path(program).parent) for program in (sys.executable, nvcc) if program]
    found["PATH"] = os.pathsep.join([os.environ.get("PATH", ""), *beside])
    return found
