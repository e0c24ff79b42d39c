"""The operators on the CPU, called from Python as users call them."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from evit_ext import ops

from . import chains
from .facts import KEEP_RATE, MODELS


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
            scores = ops.class_attention(q[:, :, 0], k)
            self.items.append((q[:, :, 0], k, x, scores, torch.empty_like(x), qkv.flatten(2)))
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
    q, k, x, scores, _, qkv = inputs.next()
    tolerance = 2e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(scores, ops.reference.class_attention(q, k), rtol=tolerance, atol=1e-6)
    tokens, kept = ops.reorganize_tokens(x, scores, keep)
    expected, expected_kept = ops.reference.reorganize_tokens(x, scores, keep)
    torch.testing.assert_close(tokens, expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(kept, expected_kept)
    torch.testing.assert_close(chains.class_attention(q, k), scores, rtol=5 * tolerance, atol=1e-4)
    eager_tokens, eager_kept = chains.reorganize_tokens(x, scores, keep)
    torch.testing.assert_close(eager_tokens, expected, rtol=5 * tolerance, atol=5 * tolerance)
    assert torch.equal(eager_kept, expected_kept)

    heads = MODELS[model][0]
    with torch.no_grad():
        for actual, wanted in zip(
            ops.attention_with_scores(qkv, heads),
            ops.reference.attention_with_scores(qkv.float(), heads),
            strict=True,
        ):
            torch.testing.assert_close(actual.float(), wanted, rtol=tolerance, atol=tolerance / 2)

    def attention(qkv: Tensor) -> Tensor:
        """Attention alone, as a block does it that wants no scores."""
        q, k, v = ops.reference.unpacked(qkv, heads)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    def with_backward(attend: Callable[[Tensor], Tensor], qkv: Tensor, grad: Tensor) -> Tensor:
        """Attention and its gradient, as in a block that is trained."""
        leaf = qkv.detach().requires_grad_()
        return torch.autograd.grad(attend(leaf), leaf, grad)[0]

    def ours(qkv: Tensor) -> Tensor:
        return ops.attention_with_scores(qkv, heads)[0]

    exact = with_backward(attention, qkv.float(), x.float())
    torch.testing.assert_close(with_backward(ours, qkv, x).float(), exact, rtol=tolerance, atol=tolerance)

    def on_next(function: Callable[..., Any]) -> Callable[[], Any]:
        return lambda: function(*inputs.next())

    seconds_of = time_interleaved(
        {
            "copy": on_next(lambda q, k, x, s, out, qkv: out.copy_(x)),
            "class_attention": on_next(lambda q, k, x, s, out, qkv: ops.class_attention(q, k)),
            "class_attention, eager": on_next(lambda q, k, x, s, out, qkv: chains.class_attention(q, k)),
            "reorganize_tokens": on_next(lambda q, k, x, s, out, qkv: ops.reorganize_tokens(x, s, keep)),
            "reorganize_tokens, eager": on_next(
                lambda q, k, x, s, out, qkv: chains.reorganize_tokens(x, s, keep)
            ),
            "attention_with_scores": on_next(
                lambda q, k, x, s, out, qkv: ops.attention_with_scores(qkv, heads)
            ),
            "attention, eager": on_next(lambda q, k, x, s, out, qkv: attention(qkv)),
            "attention_with_scores, with backward": on_next(
                lambda q, k, x, s, out, qkv: with_backward(ours, qkv, x)
            ),
            "attention, eager, with backward": on_next(
                lambda q, k, x, s, out, qkv: with_backward(attention, qkv, x)
            ),
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
        "| reorganize_tokens: µs, GB/s | eager µs | times "
        "| attention_with_scores: µs | attention without scores, eager µs | times "
        "| with its gradient: µs | eager µs | times |",
        "|" + "---|" * 15,
    ]
    for row in rows:
        cells = [row["model"], row["batch"], row["dtype"]]
        micro, rate = row["microseconds"], row["gigabytes_per_second"]
        cells.append(f"{micro['copy']:.0f}, {rate['copy']:.1f}")
        for name in ("class_attention", "reorganize_tokens"):
            eager = micro[f"{name}, eager"]
            cells += [f"{micro[name]:.0f}, {rate[name]:.1f}", f"{eager:.0f}", f"{eager / micro[name]:.1f}"]
        for suffix in ("", ", with backward"):
            ours, eager = micro[f"attention_with_scores{suffix}"], micro[f"attention, eager{suffix}"]
            cells += [f"{ours:.0f}", f"{eager:.0f}", f"{eager / ours:.1f}"]
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return "\n".join(lines) + "\n"
