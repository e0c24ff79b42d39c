"""The command line: ``python -m study run``, ``list``, ``speed``, ``page``."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from study.experiment import Experiment, has_weights
from study.page import page_name, write_page
from study.plan import Plan, read_plan
from study.results import Results
from study.speed import measure_speed

HERE = Path(__file__).parent


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m study", description=__doc__)
    parser.add_argument("--plan", type=Path, default=HERE / "plan.yaml", help="(default: %(default)s)")
    parser.add_argument("--results", type=Path, help="their folder (default: results/PLAN beside the plan)")
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="run what has no result yet, one run after the other")
    run.add_argument("--arms", nargs="+", metavar="ARM", help="only these, and what they start from")
    run.add_argument("--seeds", nargs="+", type=int, metavar="SEED", help="only these")
    run.add_argument("--minutes", type=float, help="begin no further run after this time")
    run.add_argument("--weights", type=Path, help="folder (default: runs/study/PLAN)")
    run.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    run.add_argument("--precision", default="float32", help="as of evit train (default: %(default)s)")
    run.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="runs at a time, in a process with one thread each"
    )
    run.add_argument(
        "--workers", type=int, default=0, metavar="N", help="of each job, to draw images (default: 0)"
    )
    commands.add_parser("list", help="say what was run and what was not")
    speed = commands.add_parser("speed", help="measure how many images a second the networks take")
    speed.add_argument("--seconds", type=float, default=120, help="for all of them (default: %(default)g)")
    speed.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    speed.add_argument("--precision", default="float32", help="as of evit train (default: %(default)s)")
    page = commands.add_parser("page", help="write the page with the answers, and its plots")
    page.add_argument(
        "--output", type=Path, help="(default: docs/study.md, of other plans docs/study-PLAN.md)"
    )
    options = parser.parse_args(arguments)
    try:
        plan = read_plan(options.plan)
        results = Results(options.results or options.plan.parent / "results" / plan.name, plan)
        if options.command == "list":
            _list(plan, results)
        elif options.command == "speed":
            measure_speed(plan, results.speed, options.seconds, options.device, options.precision)
        elif options.command == "page":
            write_page(plan, results, options.output or Path("docs") / f"{page_name(plan)}.md")
        else:
            options.weights = options.weights or Path("runs/study") / plan.name
            if options.jobs > 1:
                return _run_in_processes(plan, options)
            _run(plan, results, options)
    except (OSError, ValueError) as error:
        print(f"study: {error}", file=sys.stderr)
        return 1
    return 0


def _list(plan: Plan, results: Results) -> None:
    for name, arm in plan.arms.items():
        found = results.of(name)
        values = " ".join(f"{result['top1']:.2f}" for result in found.values())
        print(f"{name}: {len(found)} of {arm.seeds} runs  {values}".rstrip())


def _chosen(plan: Plan, options: argparse.Namespace) -> list[tuple[str, int]]:
    """Return the runs that were asked for, and those that they need, in order."""
    names = set(plan.arms if options.arms is None else options.arms)
    if unknown := sorted(names - set(plan.arms)):
        raise ValueError(f"there is no arm {unknown[0]!r} in the plan: {', '.join(plan.arms)}")
    while more := {needed for name in names for needed in plan.needs(name)} - names:
        names |= more
    return [
        (name, seed)
        for name, seed in plan.runs()
        if name in names and (options.seeds is None or seed in options.seeds)
    ]


def _run(plan: Plan, results: Results, options: argparse.Namespace) -> None:
    start = time.monotonic()
    for name, seed in _chosen(plan, options):
        result = results.get(name, seed)
        there = has_weights(options.weights, plan, name, seed)
        if result is not None and (there or not _is_started_from(plan, name)):
            continue
        if options.minutes is not None and time.monotonic() - start > 60 * options.minutes:
            print(f"{options.minutes:g} minutes are over: run it again to go on")
            return
        found = Experiment(
            plan, name, seed, options.weights, options.device, options.precision, options.workers
        ).run()
        print(f"{name}, seed {seed}: {found['top1']:.2f} % in {found['seconds']:.0f} s", flush=True)
        if result is None:
            results.put(found)
        elif abs(result["top1"] - found["top1"]) > 2:
            raise ValueError(
                f"{name}, seed {seed}, was run again for its weights, and has {found['top1']:.2f} % where "
                f"{results.path(name, seed)} says {result['top1']:.2f} %"
            )


def _is_started_from(plan: Plan, name: str) -> bool:
    return any(name in plan.needs(other) for other in plan.arms)


def _run_in_processes(plan: Plan, options: argparse.Namespace) -> int:
    """Share out the seeds among processes: a run only needs runs of its own seed."""
    seeds = sorted({seed for _, seed in _chosen(plan, options)})
    before = ["--plan", str(options.plan)]
    after = ["--weights", str(options.weights), "--device", options.device, "--precision", options.precision]
    after += ["--workers", str(options.workers)]
    if options.results is not None:
        before += ["--results", str(options.results)]
    if options.arms is not None:
        after += ["--arms", *options.arms]
    if options.minutes is not None:
        after += ["--minutes", str(options.minutes)]
    processes = []
    for job in range(min(options.jobs, len(seeds))):
        own = [str(seed) for seed in seeds[job :: options.jobs]]
        command = [sys.executable, "-m", "study", *before, "run", *after, "--seeds", *own]
        processes.append(subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}))
    try:
        codes = [process.wait() for process in processes]
        return int(any(codes))
    finally:
        for process in processes:
            process.kill()


if __name__ == "__main__":
    sys.exit(main())
