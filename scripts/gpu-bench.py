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

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpu_check import session
from gpu_check.bench import BENCHMARKS, DEFAULT, bench_environment, bench_plan, needs_build
from gpu_check.paths import WORK, start_afresh
from gpu_check.runner import Step


def main() -> int:
    parser = session.parser(__doc__)
    parser.add_argument(
        "--only",
        nargs="+",
        choices=list(BENCHMARKS),
        default=list(DEFAULT),
        metavar="NAME",
        help=f"of {', '.join(BENCHMARKS)} (default: {' '.join(DEFAULT)})",
    )
    arguments = parser.parse_args()
    names = tuple(dict.fromkeys(arguments.only))

    def steps(facts: dict[str, Any], output: Path, left: Callable[[], float]) -> list[Step]:
        WORK.mkdir(parents=True, exist_ok=True)
        build = needs_build(arguments.python, facts)
        if build:
            print("There is no build of these sources for this torch: building first.", flush=True)
            start_afresh()
        return bench_plan(facts, arguments.python, output, left(), names, build)

    bench = session.Session(
        "gpu-bench",
        "measure",
        "Benchmarks on a GPU",
        f"gpu-bench-{'-'.join(names)}",
        steps,
        bench_environment,
    )
    return session.run(bench, arguments)


if __name__ == "__main__":
    sys.exit(main())
