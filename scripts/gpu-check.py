#!/usr/bin/env python3
"""Check and measure everything on the GPU that is there: build, tests, sanitizers, benchmarks.

    scripts/gpu-check.py --output benchmarks/results

Uses the Python it is started with (or --python), which must have torch with CUDA, timm, pytest, hypothesis,
ninja, pybind11 and setuptools, and for all of the tests expecttest; makes no environment, needs no network
and writes nothing but into build/gpu-check, where it begins afresh, and the output folder. Every step has a
time limit and a log of its own, and a step that fails stops only those that need what it makes. Steps that do
not need each other run at the same time; the benchmarks run last, alone.

Writes gpu-check-GPU.json, gpu-check-GPU.md and the logs in gpu-check-GPU.logs/ to the output folder, after
every step again. Exit code: 0 all passed, 1 something did not, 2 there is no GPU. The commit is what git says
or, where the source came without its history, the environment variable EVIT_COMMIT.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import time
from pathlib import Path

from gpu_check.facts import collect_facts, slug_of
from gpu_check.outcomes import Result
from gpu_check.paths import ROOT, start_afresh
from gpu_check.report import table, untested, verdict, write_summary
from gpu_check.runner import Runner
from gpu_check.steps import environment, plan


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
    shutil.rmtree(logs, ignore_errors=True)
    start_afresh()
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
    print(f"\n{table(results)}\n{verdict(results, len(steps), untested(facts))}\n{stem}.json, .md, .logs/")
    return 0 if all(result.fine for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
