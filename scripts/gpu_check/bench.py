"""The benchmarks that take minutes each: which, in what time, and on which build."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .facts import cuda_tool, slug_of
from .outcomes import Judge, benchmark_summary, measured_summary
from .paths import ROOT, SITE, WORK, built_from_these_sources
from .runner import Step
from .steps import PACKAGE, build_steps, environment

BUILD_SECONDS = 180.0  # that are kept for the build, where one is needed
#: Beyond its own limit: importing torch and making the models before it counts, writing and drawing after.
MARGIN_SECONDS = 20.0
LEAST_MINUTES = 0.1  # in less, nothing is measured


@dataclass(frozen=True)
class Benchmark:
    """A script that takes --minutes and --output, and how many minutes it is given if there are as many."""

    script: str
    minutes: float
    judge: Judge
    arguments: tuple[str, ...] = ()
    tool: str = ""  # a program of the CUDA toolkit without which it cannot be run


BENCHMARKS = {
    "end-to-end": Benchmark("end_to_end.py", 6.5, benchmark_summary, ("--device", "cuda")),
    "growth": Benchmark("growth.py", 2.5, measured_summary, ("--device", "cuda")),
    "counters": Benchmark("kernel_counters.py", 2.0, measured_summary, tool="ncu"),
    "training": Benchmark("gpu_training.py", 4.5, benchmark_summary, ("--device", "cuda")),
}
DEFAULT = ("end-to-end", "growth")


def needs_build(python: str, facts: dict[str, Any]) -> bool:
    """Whether there is no build that can be used: of these sources, for this Python, with CUDA kernels."""
    if not built_from_these_sources():
        return True
    command = (python, "-c", PACKAGE, str(SITE))
    try:
        run = subprocess.run(
            command, cwd=WORK, env=environment(facts, python), capture_output=True, text=True, timeout=120
        )
    except (OSError, subprocess.TimeoutExpired):
        return True
    return run.returncode != 0 or f"'built_with_torch': '{facts['torch']}'" not in run.stdout


def bench_plan(
    facts: dict[str, Any], python: str, output: Path, total: float, names: tuple[str, ...], build: bool
) -> list[Step]:
    """The steps, one after another. Where there is too little time for all, each gets less in proportion."""
    steps = build_steps(python, total) if build else []
    missing = {name: _missing(BENCHMARKS[name]) for name in names}
    run = [name for name in names if not missing[name]]
    there = total - (BUILD_SECONDS if build else 0.0) - MARGIN_SECONDS * len(run)
    wanted = 60 * sum(BENCHMARKS[name].minutes for name in run)
    share = max(0.0, min(1.0, there / wanted)) if run else 0.0
    for name in names:
        benchmark = BENCHMARKS[name]
        minutes = benchmark.minutes * share
        stem = output / f"{name}-{slug_of(facts['gpu'])}"
        command = [python, str(ROOT / "benchmarks" / benchmark.script), *benchmark.arguments]
        command += ["--minutes", f"{minutes:.2f}", "--output", str(stem)]
        seconds = 60 * minutes + MARGIN_SECONDS
        ends_by = total if minutes >= LEAST_MINUTES else 0.0  # at once: there is no time left
        needs, after = (("package",) if build else ()), tuple(step.name for step in steps)
        steps.append(
            Step(
                name,
                (tuple(command),),
                seconds,
                ends_by,
                needs,
                after,
                missing[name],
                benchmark.judge,
                cwd=WORK,
            )
        )
    return steps


def _missing(benchmark: Benchmark) -> str:
    return f"no {benchmark.tool}" if benchmark.tool and not cuda_tool(benchmark.tool) else ""


def bench_environment(facts: dict[str, Any], python: str = "") -> dict[str, str]:
    """That of every step: they run alone, so that torch may have all threads."""
    found = environment(facts, python)
    for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY"):
        del found[name]
    return found
