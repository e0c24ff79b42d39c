"""What gpu-check and gpu-bench have in common: options, facts, running the steps, the summary."""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .facts import collect_facts, slug_of
from .outcomes import Result
from .paths import ROOT
from .report import table, verdict, write_summary
from .runner import Runner, Step
from .steps import at_once


@dataclass(frozen=True)
class Session:
    """Of a script: what it does to the GPU, the title of its summary, and what it runs there.

    `plan` gets the facts, the folder of the results and the seconds that are left, and is called once.
    """

    name: str
    purpose: str  # as in "there is no GPU to measure"
    title: str
    stem: str
    plan: Callable[[dict[str, Any], Path, Callable[[], float]], list[Step]]
    environment: Callable[[dict[str, Any], str], dict[str, str]]
    untested: Callable[[dict[str, Any]], list[str]] = lambda facts: []


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser of the options that both have."""
    found = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    found.add_argument(
        "--output",
        type=Path,
        default=ROOT / "benchmarks" / "results",
        metavar="DIR",
        help="folder of the results (default: benchmarks/results)",
    )
    found.add_argument("--python", default=sys.executable, help="the Python to run (default: this one)")
    found.add_argument("--minutes", type=float, default=9.5, help="for everything (default: 9.5)")
    return found


def run(session: Session, arguments: argparse.Namespace) -> int:
    """Run all steps and return the exit code: 0 all fine, 1 something not, 2 there is no GPU."""
    began = time.monotonic()
    try:
        facts = collect_facts(arguments.python)
    except RuntimeError as error:
        print(f"{session.name}: there is no GPU to {session.purpose}: {error}", file=sys.stderr)
        return 2
    output = arguments.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    stem = output / f"{session.stem}-{slug_of(facts['gpu'])}"
    logs = stem.with_suffix(".logs")
    shutil.rmtree(logs, ignore_errors=True)
    for name, fact in facts.items():
        print(f"{name}: {fact}", flush=True)
    # The time that finding the facts took counts as well.
    steps = session.plan(facts, output, lambda: arguments.minutes * 60 - (time.monotonic() - began))
    untested = session.untested(facts)

    def write(results: list[Result]) -> None:
        write_summary(stem, facts, results, len(steps), session.title, untested)

    runner = Runner(steps, logs, session.environment(facts, arguments.python), write, at_once(facts))
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: runner.interrupt())
    results = runner.run()
    write(results)
    print(f"\n{table(results)}\n{verdict(results, len(steps), untested)}\n{stem}.json, .md, .logs/")
    return 0 if all(result.fine for result in results) else 1
