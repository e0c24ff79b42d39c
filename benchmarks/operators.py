"""Time the operators next to the same work in plain PyTorch and to copying the tokens once.

    python benchmarks/operators.py --output benchmarks/results/operators-cpu
    python benchmarks/operators.py --device cuda --output benchmarks/results/operators-cuda

Every candidate's result is compared with the reference before it is timed. The candidates take turns, round
after round, on inputs that rotate through buffers of --cache-mib in all, which should exceed the last-level
cache (on a GPU by default three times its L2); the median round counts. GB/s is what an operator must at
least move (each input it needs read once, each output written once) over that time.

On a GPU, an operator is timed in two ways: "replayed" from a CUDA graph that runs it on each of the inputs,
which is the time of the kernels; and "called" from Python, as users call it. The published method's chain of
PyTorch operators is called, and under torch.compile both called and replayed. Forward passes are timed
without autograd, backward passes by torch.autograd.grad.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from operator_times import cpu, cuda
from operator_times.facts import MODELS, commit, machine
from time_limit import Missing, in_time

from evit_ext import _C


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--output", type=Path, help="write OUTPUT.json and OUTPUT.md as well")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--batch", type=int, nargs="+", help="default: 1 16 64; on a GPU 1 8 64 256 1024")
    parser.add_argument(
        "--dtypes",
        nargs="+",
        choices=["float32", "bfloat16"],
        help="default: both; on a GPU bfloat16",
    )
    parser.add_argument(
        "--seconds", type=float, help="for each row (default: 3; on a GPU 0.4, for each operator)"
    )
    parser.add_argument(
        "--cache-mib", type=int, help="size of the rotating buffers (default: 64; on a GPU 3 times the L2)"
    )
    parser.add_argument(
        "--limit", type=float, default=170.0, help="seconds for all rows on a GPU (default: 170)"
    )
    return parser.parse_args()


def on_cpu(arguments: argparse.Namespace, dtypes: list[torch.dtype]) -> int:
    rows = [
        cpu.measure(model, batch, dtype, arguments.seconds or 3.0, (arguments.cache_mib or 64) * 2**20)
        for model in arguments.models
        for dtype in dtypes or [torch.float32, torch.bfloat16]
        for batch in arguments.batch or [1, 16, 64]
    ]
    text = cpu.table(rows)
    print(text)
    write(arguments, "the CPU", {"machine": machine("cpu"), "rows": rows}, text)
    return 0


def on_cuda(arguments: argparse.Namespace, dtypes: list[torch.dtype]) -> int:
    if not torch.cuda.is_available():
        raise SystemExit("there is no GPU: torch.cuda.is_available() is False")
    if not _C.build_info()["cuda_operators"]:
        raise SystemExit("evit_ext was built without CUDA operators: there is nothing to time")
    commit()  # before the results change the tree
    rows: list[dict[str, Any]] = []
    failures: list[str] = []
    cache = arguments.cache_mib or 3 * torch.cuda.get_device_properties(0).L2_cache_size // 2**20
    # The most telling first. Compiling takes most of the time.
    batches = arguments.batch or [256, 1, 8, 64, 1024]
    wanted = [
        cuda.Measurement(*of, of[0] == "DeiT-S", arguments.seconds or 0.4, cache * 2**20)
        for of in itertools.product(arguments.models, batches, dtypes or [torch.bfloat16])
    ]

    def measure(given: cuda.Measurement) -> None:
        found = cuda.measure(given)
        rows.extend(found[0])
        failures.extend(f"{given}, {failure}" for failure in found[1])

    def save(missing: Missing) -> str:
        missing = Missing(missing.left_out, missing.failures + failures)
        text = f"{cuda.table(rows)}\n{missing}\n".rstrip("\n") + "\n"
        contents = {"machine": machine("cuda"), **asdict(missing), "rows": rows}
        write(arguments, "a GPU", contents, text)
        return text

    missing = in_time(wanted, measure, arguments.limit / 60, lambda m: 40.0 if m.compiled else 15.0, save)
    print(save(missing))
    return 1 if missing.failures + failures else 0


def write(arguments: argparse.Namespace, place: str, everything: dict[str, Any], text: str) -> None:
    """OUTPUT.json and OUTPUT.md, where --output names them."""
    if not arguments.output:
        return
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.with_suffix(".json").write_text(json.dumps(everything, indent=1) + "\n")
    heading = f"# Operators on {place}\n\n"
    heading += "".join(f"- {name}: {fact}\n" for name, fact in everything["machine"].items())
    arguments.output.with_suffix(".md").write_text(f"{heading}\n{text}")


def main() -> int:
    arguments = parse()
    dtypes = [getattr(torch, name) for name in arguments.dtypes or []]
    return (on_cuda if arguments.device == "cuda" else on_cpu)(arguments, dtypes)


if __name__ == "__main__":
    sys.exit(main())
