"""Everything there is to run, and the environment it runs in."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from .facts import beside_python, cuda_tool, program, slug_of
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
        Step("package", ((python, "-c", PACKAGE, str(SITE)),), 90, ends_by, ("build",), cwd=WORK),
    ]


def files_of_tests(folder: Path) -> dict[str, Path]:
    """The tests, a step and so a process for each file: those of an operator, of a model, and so on.

    A kernel that reads or writes out of bounds takes the CUDA context of its process with it, and what is
    tested after it in the same process. And the time there is would not do for one after another.
    """
    found = [path for name in ("ops", "cuda", "models") for path in sorted((folder / name).glob("test_*.py"))]
    names = ("apply", "block", "block_at_once", "record", "macs")
    found += [folder / f"test_{name}.py" for name in names]
    # Of tests of large tensors all are slow.
    return {f"tests-{path.stem.removeprefix('test_')}": path for path in found if "large" not in path.stem}


def plan(facts: dict[str, Any], python: str, output: Path, total: float, quick: bool) -> list[Step]:
    """All steps. They run together except the benchmarks, for which the last part of the time is reserved."""
    tests = ROOT / "python_tests"
    reserve = 60.0 if quick else 200.0  # for the benchmarks
    before = total - reserve

    def pytest_step(name: str, seconds: float, *arguments: str, after: tuple[str, ...] = ()) -> Step:
        command = pytest_command(python, *arguments)
        return Step(name, (command,), seconds, before, ("package",), after, judge=pytest_summary, cwd=WORK)

    # The C++ tests first among those that wait for a place: under a sanitizer they take long.
    steps = build_steps(python, before) + cpp_steps(facts, python, before, quick)
    testing = [pytest_step(name, 300, str(path)) for name, path in files_of_tests(tests).items()]
    steps += testing
    if not quick:
        # After the other tests: it needs much of the GPU's memory.
        others = tuple(step.name for step in testing)
        steps.append(pytest_step("tests-slow", 150, "-m", "slow", str(tests / "cuda"), after=others))
    stem = output / f"operators-{slug_of(facts['gpu'])}"
    benchmark = [python, str(ROOT / "benchmarks" / "operators.py"), "--device", "cuda", "--output", str(stem)]
    # It stops by itself in time, and leaves out what it did not get to.
    benchmark += ["--limit", str(round(reserve * 0.85)), *(["--quick"] if quick else [])]
    everything = tuple(step.name for step in steps)
    steps.append(
        Step(
            "benchmarks", (tuple(benchmark),), reserve, total, ("package",), everything, "", benchmark_summary
        )
    )
    return steps


def cpp_steps(facts: dict[str, Any], python: str, before: float, quick: bool) -> list[Step]:
    """The C++ tests of the CUDA kernels: built, run, and run under each tool of compute-sanitizer."""
    architecture = facts["capability"].replace(".", "")
    cmake, ninja = program("cmake", python), program("ninja", python)
    configure = [cmake, "-S", str(ROOT), "-B", str(CMAKE), "-DEVIT_CUDA=ON", "-DEVIT_LIBRARY=OFF"]
    configure += [f"-DCMAKE_CUDA_ARCHITECTURES={architecture}"]
    configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
    configure += [f"-DCMAKE_CUDA_COMPILER={cuda_tool('nvcc')}"] if cuda_tool("nvcc") else []
    compile_tests = [cmake, "--build", str(CMAKE), "--target", "evit_cuda_tests"]
    compile_tests += ["--parallel", str(facts["cores"])]
    no_cmake = "" if cmake else "no cmake"
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
            Step(f"cpp-{tool}", (command,), 300, before, needs, after, no_sanitizer, sanitizer_summary)
        )
    return steps


def environment(facts: dict[str, Any], python: str = "") -> dict[str, str]:
    """That of every step."""
    cores = facts["cores"]
    found = {
        **os.environ,
        "PYTHONUNBUFFERED": "1",
        "FORCE_CUDA": "1",
        # Several steps run at once, and the tensors on the CPU are small.
        "OMP_NUM_THREADS": str(max(1, cores // 8)),
        "OMP_WAIT_POLICY": "PASSIVE",
        "EVIT_COMMIT": facts["commit"],
        "PYTHONPATH": os.pathsep.join(filter(None, [str(SITE), os.environ.get("PYTHONPATH", "")])),
    }
    # Whatever the environment says: some images list all architectures, which take long.
    found["TORCH_CUDA_ARCH_LIST"] = facts["capability"]
    # By itself the build asks how much memory is free, which is little in a virtual machine that is given its
    # memory only as it is used.
    found.setdefault("MAX_JOBS", str(cores))
    # ninja lies beside the Python that has it; without it, files are compiled one after another.
    nvcc = cuda_tool("nvcc")
    beside = [*beside_python(python), *([str(Path(nvcc).parent)] if nvcc else [])]
    found["PATH"] = os.pathsep.join([os.environ.get("PATH", ""), *beside])
    return found


def at_once(facts: dict[str, Any]) -> int:
    """How many steps may run at the same time: one a core, and one for 2 GiB of the GPU's memory."""
    return max(1, min(facts["cores"], int(facts["memory_gib"] / 2)))
