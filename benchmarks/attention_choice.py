"""Check on this machine that the attention that is on by default is the faster one.

    python benchmarks/attention_choice.py --output benchmarks/results/attention-choice-cpu

A line for each task, dtype, batch and number of tokens: what evit_ext.ops.attention_with_scores takes as it
chooses by itself, with its kernel, and with PyTorch's scaled_dot_product_attention and class_attention; and
what PyTorch's takes alone, without scores, of the same projection. The calls take turns; medians count.
The exit status is 1 where the default is slower than the other choice by more than --noise.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from operator_times.facts import machine
from torch import Tensor

from evit_ext import ops
from evit_ext._util.tables import aligned
from evit_ext.benchmark import Here, time_in_turns
from evit_ext.ops import library

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CHANNELS = 64


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--precision", nargs="+", choices=DTYPES, default=["float32", "bfloat16"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[138, 197, 577], metavar="N")
    parser.add_argument("--batch-size", nargs="+", type=int, default=[1, 16], metavar="N")
    parser.add_argument("--heads", type=int, default=6, metavar="H", help=f"of {CHANNELS} channels")
    parser.add_argument("--seconds", type=float, default=4, help="for each line (default: 4)")
    parser.add_argument("--noise", type=float, default=5, metavar="PERCENT", help="not counted (default: 5)")
    parser.add_argument("--output", type=Path, metavar="STEM", help="write STEM.json and STEM.md, too")
    options = parser.parse_args()
    rows = [
        measure(name, batch, tokens, options.heads, training, options.seconds)
        for training, name, batch, tokens in product(
            (False, True), options.precision, options.batch_size, options.tokens
        )
    ]
    slower = [row for row in rows if is_slower(row, options.noise / 100)]
    table = aligned([list(rows[0]), *([str(value) for value in row.values()] for row in rows)])
    verdict = f"slower than the other choice by over {options.noise:g} %: {len(slower)} of {len(rows)} lines"
    print(f"{table}\n\n{verdict}")
    for row in slower:
        print("  " + ", ".join(f"{name} {value}" for name, value in row.items()))
    if options.output is not None:
        tiled = ", ".join(sorted(map(str, library.TILED))) or "none"
        facts = {**machine("cpu"), "threads": torch.get_num_threads(), "dtypes on tiles": tiled}
        options.output.parent.mkdir(parents=True, exist_ok=True)
        everything = {"machine": facts, "rows": rows, "slower": slower}
        options.output.with_suffix(".json").write_text(json.dumps(everything, indent=1) + "\n")
        said = "".join(f"- {name}: {fact}\n" for name, fact in facts.items())
        text = f"# Attention by default, over PyTorch's\n\n{said}\n```\n{table}\n\n{verdict}\n```\n"
        options.output.with_suffix(".md").write_text(text)
    return int(bool(slower))


def is_slower(row: dict[str, Any], noise: float) -> bool:
    """Return whether the default of a line takes longer than the other choice."""
    best = min(row["kernel ms"], row["composed ms"])
    return bool(row["default ms"] > (1 + noise) * best)


def measure(name: str, batch: int, tokens: int, heads: int, training: bool, seconds: float) -> dict[str, Any]:
    """Return a line: medians in ms, and PyTorch's over the default's."""
    dtype = DTYPES[name]
    torch.manual_seed(0)
    qkv = torch.randn(batch, tokens, 3 * CHANNELS * heads).to(dtype).requires_grad_(training)

    def pytorch() -> tuple[Tensor, None]:
        q, k, v = qkv.view(batch, tokens, 3, heads, CHANNELS).permute(2, 0, 3, 1, 4).unbind(0)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2), None

    def chosen(tiled: frozenset[torch.dtype]) -> Callable[[], tuple[Tensor, Tensor]]:
        def run() -> tuple[Tensor, Tensor]:
            before, library.TILED = library.TILED, tiled
            try:
                return ops.attention_with_scores(qkv, heads)
            finally:
                library.TILED = before

        return run

    def task(attention: Callable[[], tuple[Tensor, Tensor | None]]) -> Callable[[], Any]:
        if not training:
            return torch.no_grad()(attention)

        def step() -> None:
            out, scores = attention()
            grads = [torch.ones_like(t) for t in (out, scores) if t is not None]
            torch.autograd.grad([t for t in (out, scores) if t is not None], qkv, grads)

        return step

    calls = {
        "PyTorch's": task(pytorch),
        "default": task(chosen(library.TILED)),
        "kernel": task(chosen(frozenset())),
        "composed": task(chosen(frozenset({dtype}))),
    }
    times = time_in_turns({key: Here(call, qkv.device) for key, call in calls.items()}, seconds, 20)
    median = {key: 1e3 * statistics.median(taken) for key, taken in times.items()}
    return {
        "task": "training" if training else "inference",
        "precision": name,
        "batch": batch,
        "tokens": tokens,
        **{f"{key} ms": round(value, 3) for key, value in median.items()},
        "PyTorch's / default": round(median["PyTorch's"] / median["default"], 2),
    }


if __name__ == "__main__":
    sys.exit(main())
