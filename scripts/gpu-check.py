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

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpu_check import session
from gpu_check.paths import start_afresh
from gpu_check.report import untested
from gpu_check.runner import Step
from gpu_check.steps import environment, plan


def main() -> int:
    parser = session.parser(__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="one sanitizer, no tests of large tensors, few benchmarks"
    )
    arguments = parser.parse_args()

    def steps(facts: dict[str, Any], output: Path, left: Callable[[], float]) -> list[Step]:
        start_afresh()
        return plan(facts, arguments.python, output, left(), arguments.quick)

    check = session.Session("gpu-check", "check on", "GPU check", "gpu-check", steps, environment, untested)
    return session.run(check, arguments)


if __name__ == "__main__":
    sys.exit(main())
