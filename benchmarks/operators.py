"""Time the operators next to the same work in plain PyTorch and to copying the tokens once.

    python benchmarks/operators.py --output benchmarks/results/operators-cpu

Every candidate's result is compared with the reference before it is timed. The candidates take turns, round
after round, on inputs that rotate through buffers of --cache-mib in all, which should exceed the last-level
cache; the median round counts. GB/s is what an operator must at least move (each input it needs read once,
each output written once) over that time.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evit_ext import _C, ops

MODELS = {"DeiT-S": (6, 197, 64), "DeiT-B": (12, 197, 64)}  # H, N, D
KEEP_RATE = 0.7


def eager_class_attention(q: Tensor, k: Tensor) -> Tensor:
    """The class token's row of the attention map, in PyTorch operators."""
    logits = (q.unsqueeze(2) @ k.transpose(-2, -1)).squeeze(2) * q.shape[2] ** -0.5
    return logits.softmax(-1).float().mean(1)


def eager_reorganize_tokens(x: Tensor, scores: Tensor, num_keep: int) -> tuple[Tensor, Tensor]:
    """The published method's steps: topk, complement by sorting, two gathers, weighted sum, concatenation."""
    patches, patch_scores = x[:, 1:], scores[:, 1:]
    kept = patch_scores.topk(num_keep, dim=1).indices.sort(dim=1).values
    mask = torch.ones_like(patch_scores).scatter_(1, kept, 0)
    others = mask.sort(dim=1, descending=True, stable=True).indices[:, : patches.shape[1] - num_keep]
    rows = others.unsqueeze(-1).expand(-1, -1, x.shape[2])
    weights = patch_scores.gather(1, others).unsqueeze(-1).to(x.dtype)
    fused = (patches.gather(1, rows) * weights).sum(dim=1, keepdim=True)
    tokens = patches.gather(1, kept.unsqueeze(-1).expand(-1, -1, x.shape[2]))
    return torch.cat([x[:, :1], tokens, fused], dim=1), kept


class Inputs:
    """Tensors of one shape and dtype, and the next of them on every call."""

    def __init__(self, model: str, batch: int, dtype: torch.dtype, cache_bytes: int) -> None:
        heads, tokens, channels = MODELS[model]
        width = heads * channels
        nbytes = batch * tokens * 4 * width * dtype.itemsize
        self.count = max(2, math.ceil(cache_bytes / nbytes))
        self.num_keep = math.ceil(KEEP_RATE * (tokens - 1))
        generator = torch.Generator().manual_seed(0)
        self.items = []
        for _ in range(self.count):
            qkv = torch.randn(batch, tokens, 3, heads, channels, generator=generator).to(dtype)
            q, k, _ = qkv.permute(2, 0, 3, 1, 4).unbind(0)
            x = torch.randn(batch, tokens, width, generator=generator).to(dtype)
            self.items.append((q[:, :, 0], k, x, ops.class_attention(q[:, :, 0], k), torch.empty_like(x)))
        self.turn = 0

    def next(self) -> tuple[Tensor, ...]:
        self.turn = (self.turn + 1) % self.count
        return self.items[self.turn]


def time_interleaved(candidates: dict[str, Callable[[], Any]], seconds: float) -> dict[str, float]:
    """Median seconds of each candidate, in rounds in which each runs once."""
    for run in candidates.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in candidates}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[next(iter(times))]) < 5:
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def measure(model: str, batch: int, dtype: torch.dtype, seconds: float, cache_bytes: int) -> dict[str, Any]:
    """One row of the results: microseconds and GB/s."""
    inputs = Inputs(model, batch, dtype, cache_bytes)
    keep = inputs.num_keep
    q, k, x, scores, _ = inputs.next()
    tolerance = 2e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(scores, ops.reference.class_attention(q, k), rtol=tolerance, atol=1e-6)
    tokens, kept = ops.reorganize_tokens(x, scores, keep)
    expected, expected_kept = ops.reference.reorganize_tokens(x, scores, keep)
    torch.testing.assert_close(tokens, expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(kept, expected_kept)
    torch.testing.assert_close(eager_class_attention(q, k), scores, rtol=5 * tolerance, atol=1e-4)
    eager_tokens, eager_kept = eager_reorganize_tokens(x, scores, keep)
    torch.testing.assert_close(eager_tokens, expected, rtol=5 * tolerance, atol=5 * tolerance)
    assert torch.equal(eager_kept, expected_kept)

    def on_next(function: Callable[..., Any]) -> Callable[[], Any]:
        return lambda: function(*inputs.next())

    seconds_of = time_interleaved(
        {
            "copy": on_next(lambda q, k, x, s, out: out.copy_(x)),
            "class_attention": on_next(lambda q, k, x, s, out: ops.class_attention(q, k)),
            "class_attention, eager": on_next(lambda q, k, x, s, out: eager_class_attention(q, k)),
            "reorganize_tokens": on_next(lambda q, k, x, s, out: ops.reorganize_tokens(x, s, keep)),
            "reorganize_tokens, eager": on_next(lambda q, k, x, s, out: eager_reorganize_tokens(x, s, keep)),
        },
        seconds,
    )
    moved = {
        "copy": 2 * x.nbytes,
        "class_attention": q.nbytes + k.nbytes + scores.nbytes,
        "reorganize_tokens": x.nbytes + scores.nbytes + tokens.nbytes + kept.nbytes,
    }
    row: dict[str, Any] = {"model": model, "batch": batch, "dtype": str(dtype).removeprefix("torch.")}
    row["microseconds"] = {name: round(value * 1e6, 1) for name, value in seconds_of.items()}
    row["gigabytes_per_second"] = {
        name: round(nbytes / seconds_of[name] / 1e9, 1) for name, nbytes in moved.items()
    }
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| model | batch | dtype | copy of x: µs, GB/s | class_attention: µs, GB/s | eager µs | times "
        "| reorganize_tokens: µs, GB/s | eager µs | times |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [row["model"], row["batch"], row["dtype"]]
        micro, rate = row["microseconds"], row["gigabytes_per_second"]
        cells.append(f"{micro['copy']:.0f}, {rate['copy']:.1f}")
        for name in ("class_attention", "reorganize_tokens"):
            eager = micro[f"{name}, eager"]
            cells += [f"{micro[name]:.0f}, {rate[name]:.1f}", f"{eager:.0f}", f"{eager / micro[name]:.1f}"]
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def machine() -> dict[str, Any]:
    """What the figures were measured on and with."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line
        ]
        cpu = names[0] if names else cpu
    return {
        "processor": cpu,
        "threads": torch.get_num_threads(),
        "cpu_capability": _C.build_info()["cpu_capability"],
        "torch": torch.__version__,
        "python": platform.python_version(),
        "compiler": _C.build_info()["compiler"],
        "command": shlex.join(["python", *sys.argv]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the operators on the CPU.")
    parser.add_argument("--output", type=Path, help="write OUTPUT.json and OUTPUT.md as well")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--seconds", type=float, default=3.0, help="for each row (default: 3)")
    parser.add_argument(
        "--cache-mib", type=int, default=64, help="size of the rotating buffers (default: 64)"
    )
    arguments = parser.parse_args()
    rows = [
        measure(model, batch, dtype, arguments.seconds, arguments.cache_mib * 2**20)
        for model in MODELS
        for dtype in (torch.float32, torch.bfloat16)
        for batch in arguments.batch
    ]
    facts = machine()
    text = table(rows)
    print(text)
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.with_suffix(".json").write_text(
            json.dumps({"machine": facts, "rows": rows}, indent=1) + "\n"
        )
        heading = "# Operators on the CPU\n\n" + "".join(
            f"- {name}: {fact}\n" for name, fact in facts.items()
        )
        arguments.output.with_suffix(".md").write_text(f"{heading}\n{text}")


if __name__ == "__main__":
    main()
