#!/usr/bin/env python3
"""Run the benchmarks that need a GPU and minutes, with the Python and torch that are installed.

    scripts/gpu-bench.py                             # end-to-end and growth, in less than ten minutes
    scripts/gpu-bench.py --only counters training    # what the kernels wait for; a training with them

Like scripts/gpu-check.py it makes no environment and needs no network. The package that gpu-check has built
is used where it is still that of these sources and of this torch; otherwise it is built first, which takes
minutes of the time. The benchmarks run one after another, each with its share of the time, and leave out by
themselves what does not fit.

Writes NAME-GPU.json and .md of each benchmark; gpu-bench-NAMES-GPU.json and .md, which say what became of
each; and the logs in gpu-bench-NAMES-GPU.logs/. Exit code: 0 all ran, 1 something did not, 2 there is no GPU.
The commit is what git says or, where the source came without its history, the environment variable
EVIT_COMMIT.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import time
from pathlib import Path

from gpu_check.bench import BENCHMARKS, DEFAULT, bench_environment, bench_plan, needs_build
from gpu_check.facts import collect_facts, slug_of
from gpu_check.outcomes import Result
from gpu_check.paths import ROOT, WORK, start_afresh
from gpu_check.report import table, verdict, write_summary
from gpu_check.runner import Runner


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=list(BENCHMARKS),
        default=list(DEFAULT),
        metavar="NAME",
        help=f"of {', '.join(BENCHMARKS)} (default: {' '.join(DEFAULT)})",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=ROOT / "benchmarks" / "results",
        metavar="DIR",
        help="folder of the results (default: benchmarks/results)",
    )
    parser.add_argument(
        "--python", default=sys.executable, help="the Python to measure with (default: this one)"
    )
    parser.add_argument("--minutes", type=float, default=9.5, help="for everything (default: 9.5)")
    return parser.parse_args()


def main() -> int:
    arguments = parse()
    began = time.monotonic()
    try:
        facts = collect_facts(arguments.python)
    except RuntimeError as error:
        print(f"gpu-bench: there is no GPU to measure: {error}", file=sys.stderr)
        return 2
    names = tuple(dict.fromkeys(arguments.only))
    output = arguments.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    stem = output / f"gpu-bench-{'-'.join(names)}-{slug_of(facts['gpu'])}"
    logs = stem.with_suffix(".logs")
    shutil.rmtree(logs, ignore_errors=True)
    WORK.mkdir(parents=True, exist_ok=True)
    for name, fact in facts.items():
        print(f"{name}: {fact}")
    build = needs_build(arguments.python, facts)
    if build:
        print("There is no build of these sources for this torch: building first.", flush=True)
        start_afresh()
    # The time that finding the facts took counts as well.
    total = arguments.minutes * 60 - (time.monotonic() - began)
    steps = bench_plan(facts, arguments.python, output, total, names, build)

    def write(results: list[Result]) -> None:
        write_summary(stem, facts, results, len(steps), "Benchmarks on a GPU")

    runner = Runner(steps, logs, bench_environment(facts), write)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: runner.interrupt())
    results = runner.run()
    write(results)
    print(f"\n{table(results)}\n{verdict(results, len(steps))}\n{stem}.json, .md, .logs/")
    return 0 if all(result.fine for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
