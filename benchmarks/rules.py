"""Time the rules side by side: dense, EViT, ToMe and plain PyTorch's ToMe; and what its bias costs attention.

    python benchmarks/rules.py --output benchmarks/results/rules-cpu

Each model runs in a process of its own and they take turns, call by call; the median call counts. Speed-ups
are over timm's dense model, which has the same weights. They are random: nothing is said of accuracy here.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from operator_times.facts import machine
from plain_tome import PlainToMe
from torch import Tensor

from evit_ext import ops
from evit_ext._util.tables import aligned
from evit_ext.benchmark import Contestant, Here, Row, contestants, measure, time_in_turns
from evit_ext.training import Precision

R = 13  # as in the paper, for DeiT-S
HEADINGS = ["model", "precision", "batch", "images/s", "speed-up", "ms", "90 %", "GMACs"]
PRECISIONS = (torch.float32, torch.bfloat16)


def main() -> None:
    """Measure, print tables, and write them where asked."""
    parser = argparse.ArgumentParser(description="Time the rules side by side on the CPU.")
    parser.add_argument("--batch-size", nargs="+", type=int, default=[1, 16], metavar="N")
    parser.add_argument("--seconds", type=float, default=30.0, help="for each line of models (default: 30)")
    parser.add_argument("--output", type=Path, metavar="STEM", help="write STEM.json and STEM.md, too")
    options = parser.parse_args()
    torch.manual_seed(0)
    rows = [
        row
        for dtype in PRECISIONS
        for batch in options.batch_size
        for row in measure(
            field(),
            torch.randn(batch, 3, 224, 224),
            precision=Precision(dtype, "asked for"),
            seconds=options.seconds,
        )
    ]
    attention = [
        attention_row(dtype, batch, tokens, heads, options.seconds / 10)
        for dtype in PRECISIONS
        for batch in options.batch_size
        for tokens, heads in ((197, 6), (577, 12))
    ]
    models = aligned([HEADINGS, *map(cells, rows)])
    kernels = aligned([list(attention[0]), *([str(value) for value in row.values()] for row in attention)])
    text = f"{models}\n\nattention_with_scores by its options, ms of the median call:\n\n{kernels}"
    print(text)
    if options.output is not None:
        facts = {**machine("cpu"), "threads": torch.get_num_threads()}
        options.output.parent.mkdir(parents=True, exist_ok=True)
        everything = {"machine": facts, "models": [asdict(row) for row in rows], "attention": attention}
        options.output.with_suffix(".json").write_text(json.dumps(everything, indent=1) + "\n")
        said = "".join(f"- {name}: {fact}\n" for name, fact in facts.items())
        options.output.with_suffix(".md").write_text(f"# Rules on DeiT-S\n\n{said}\n```\n{text}\n```\n")


def cells(row: Row) -> list[str]:
    """Return a line of the table."""
    slowest = "–" if row.milliseconds_90 is None else f"{row.milliseconds_90:.1f}"
    return [
        row.model,
        row.precision,
        str(row.batch),
        f"{row.images_per_second:.1f}",
        f"{row.speedup:.2f}x",
        f"{row.milliseconds:.1f}",
        slowest,
        f"{row.gmacs:.2f}",
    ]


def field() -> list[Contestant]:
    """Return the models; all have the weights of the first."""
    dense, evit = contestants("deit_small", (0.7,))
    reduction = {"rule": "tome", "rule_args": {"r": R}, "drop_loc": list(range(12))}
    tome = contestants("deit_small", (None,), reduction=reduction)[1]
    tome.model.load_state_dict(dense.model.state_dict())
    evit.model.load_state_dict(dense.model.state_dict())
    plain = Contestant(f"plain ToMe r {R}", PlainToMe(dense.model, R).eval(), None, tome.gmacs)
    return [dense, evit, tome, plain]


def attention_row(dtype: torch.dtype, batch: int, tokens: int, heads: int, seconds: float) -> dict[str, Any]:
    """Return the times of attention as it is, with a bias of the keys, and with mean scores."""
    qkv, bias = torch.randn(batch, tokens, 3 * 64 * heads).to(dtype), torch.rand(batch, tokens)

    def call(**named: Any) -> Callable[[], tuple[Tensor, Tensor]]:
        return lambda: ops.attention_with_scores(qkv, heads, **named)

    calls = {"plain": call(), "bias": call(key_bias=bias), "mean": call(mean=True)}
    times = time_in_turns({name: Here(one, qkv.device) for name, one in calls.items()}, seconds, 20)
    median = {name: 1e3 * statistics.median(taken) for name, taken in times.items()}
    return {
        "precision": str(dtype).removeprefix("torch."),
        "batch": batch,
        "tokens": tokens,
        "heads": heads,
        **{name: round(value, 3) for name, value in median.items()},
        "bias / plain": round(median["bias"] / median["plain"], 3),
        "mean / plain": round(median["mean"] / median["plain"], 3),
    }


if __name__ == "__main__":
    main()
