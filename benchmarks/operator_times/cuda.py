"""The operators on a GPU: replayed from a CUDA graph, which is the kernels' time, and called from Python."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch._functorch.config
from time_limit import first_line
from torch import Tensor

from evit_ext import ops

from . import chains
from .facts import KEEP_RATE, MODELS

# Error allowed, relative to the largest value expected. The chains, which form their sums and products in the
# dtype itself, may be off by five times as much.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
BACKEND = "inductor"
#: What only moves rows, or is a part of another operator, is timed at this batch size alone.
PARTS_BATCH = 256
#: Patches that a block of ToMe merges away, as in its paper for DeiT-S.
MERGED = 13
#: The share of numbers that may differ where cosines, summed in another order, decide: one other token of one
#: image moves the numbers of those behind it.
ROUNDED = {"bipartite_matching": 0.02}
#: Runs something on the inputs of a number.
Call = Callable[[int], Any]


class Inputs(NamedTuple):
    """Tensors of one EViT block."""

    qkv: Tensor  # a packed projection [B, N, 3 * H * D]
    q: Tensor  # [B, H, D] and k [B, H, N, D]: slices of it, as in a model
    k: Tensor
    x: Tensor
    branch: Tensor
    scores: Tensor
    kept: Tensor  # the kept tokens, by their number among all
    rows: Tensor  # these tokens
    weight: Tensor
    bias: Tensor
    owner: Tensor  # of each patch, as ToMe merges a few of them away
    sizes: Tensor  # of each patch, float32


class Operation(NamedTuple):
    """An operator; `run` calls it in `ops`, `chains` or `ops.reference`, which have the same functions."""

    name: str
    run: Callable[[Any, Inputs], Any]
    moved: Callable[[Inputs], int]  # bytes: each input that is needed read once, each output written once
    moved_backward: Callable[[Inputs], int] | None = None  # the same for its gradient, where it is timed
    leaves: tuple[str, ...] = ()  # the inputs that have a gradient
    compiled: bool = False  # whether the compiled chain is timed as well


def operations(model: tuple[int, int, int]) -> list[Operation]:
    """Return all that is timed, for heads, tokens and channels of a head."""
    heads, tokens, _ = model
    keep = math.ceil(KEEP_RATE * (tokens - 1))
    merged = min(MERGED, (tokens - 1) // 2)

    def remaining(t: Inputs) -> int:
        return nbytes(t.x[:, : keep + 2])  # class token, kept patches, fused token

    def numbers(t: Inputs) -> int:
        return nbytes(t.scores, t.kept)

    return [
        Operation(
            "class_attention",
            lambda lib, t: lib.class_attention(t.q, t.k),
            lambda t: nbytes(t.q, t.k, t.scores),
            lambda t: 2 * nbytes(t.q, t.k) + nbytes(t.scores),
            ("q", "k"),
            compiled=True,
        ),
        Operation(
            "attention_with_scores",
            lambda lib, t: (
                attention_kernel(t.qkv, heads) if lib is ops else lib.attention_with_scores(t.qkv, heads)
            ),
            lambda t: nbytes(t.qkv, t.x, t.scores),
            compiled=True,
        ),
        Operation(
            "reorganize_tokens",
            lambda lib, t: lib.reorganize_tokens(t.x, t.scores, keep),
            lambda t: nbytes(t.x) + remaining(t) + numbers(t),
            # Of x, only the fused tokens are read again, for the gradient of their scores.
            lambda t: nbytes(t.x, t.x[:, 1 + keep :], t.scores) + remaining(t) + numbers(t),
            ("x", "scores"),
            compiled=True,
        ),
        Operation(
            "add_reorganize_norm",
            lambda lib, t: lib.add_reorganize_norm(t.x, t.branch, t.scores, keep, t.weight, t.bias),
            lambda t: nbytes(t.x, t.branch, t.weight, t.bias) + 2 * remaining(t) + numbers(t),
            compiled=True,
        ),
        Operation(
            "gather_tokens",
            lambda lib, t: lib.gather_tokens(t.x, t.kept),
            lambda t: nbytes(t.rows, t.rows, t.kept),
        ),
        Operation(
            "scatter_tokens",
            lambda lib, t: lib.scatter_tokens(t.rows, t.kept, tokens),
            lambda t: nbytes(t.rows, t.x, t.kept),
        ),
        Operation(
            "restore_tokens",
            lambda lib, t: lib.restore_tokens(t.rows, t.kept, tokens, 0, t.x),
            lambda t: nbytes(t.x, t.x, t.kept),
        ),
        Operation(
            "fuse_tokens",
            lambda lib, t: lib.fuse_tokens(t.x, t.scores, t.kept),
            lambda t: nbytes(t.rows, t.x[:, :1], t.scores[:, :keep], t.kept),
        ),
        Operation(
            "bipartite_matching",
            lambda lib, t: lib.bipartite_matching(t.k[:, :, 1:], tokens - 1 - merged),
            lambda t: nbytes(t.k[:, :, 1:], t.owner, t.owner[:, merged:]),
        ),
        Operation(
            "merge_tokens",
            lambda lib, t: lib.merge_tokens(t.x, t.owner, tokens - 1 - merged, t.sizes),
            lambda t: nbytes(t.x, t.x[:, merged:], t.owner, t.sizes, t.sizes[:, merged:]),
            # Of x, only the tokens that were merged are read again.
            lambda t: nbytes(t.x, t.x[:, : 2 * merged], t.x[:, merged:], t.owner, t.sizes, t.sizes),
            ("x",),
        ),
    ]


def attention_kernel(qkv: Tensor, heads: int) -> Any:
    """The kernel, which the function of that name does not use by itself on CUDA."""
    if qkv.is_cuda and qkv.dtype.itemsize == 2:
        return torch.ops.evit.attention_with_scores(qkv, heads, (qkv.shape[2] // (3 * heads)) ** -0.5)
    return ops.attention_with_scores(qkv, heads)


def nbytes(*tensors: Tensor) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def make_inputs(
    model: tuple[int, int, int], batch: int, dtype: torch.dtype, device: str, seed: int
) -> Inputs:
    """Random tensors. The scores are all different: how ties are broken is not the same everywhere."""
    heads, tokens, channels = model
    width = heads * channels
    generator = torch.Generator(device).manual_seed(seed)
    random = partial(torch.randn, generator=generator, device=device, dtype=dtype)
    qkv, x, branch = (random(batch, tokens, factor * width) for factor in (3, 1, 1))
    q, k, _ = ops.reference.unpacked(qkv, heads)
    ranks = torch.rand(batch, tokens, generator=generator, device=device).argsort(dim=1)
    scores = (ranks + 1).float() * (2 / (tokens * (tokens + 1)))
    keep = math.ceil(KEEP_RATE * (tokens - 1))
    kept = ops.reference.reorganize_tokens(x[:, :, :1], scores, keep)[1] + 1
    rows = chains.gather_tokens(x, kept)
    merged = min(MERGED, (tokens - 1) // 2)
    owner = ops.reference.bipartite_matching(k[:, :, 1:], tokens - 1 - merged)[1]
    sizes = torch.ones(owner.shape, device=device)
    return Inputs(
        qkv, q[:, :, 0], k, x, branch, scores, kept, rows, random(width), random(width), owner, sizes
    )


def outputs(result: Any) -> list[Tensor]:
    return list(result) if isinstance(result, (tuple, list)) else [result]


def forward(function: Callable[[Inputs], Any], sets: list[Inputs]) -> Call:
    """What runs a function on the inputs of a number."""

    def call(number: int) -> Any:
        with torch.no_grad():
            return function(sets[number])

    return call


def backward(function: Callable[[Inputs], Any], sets: list[Inputs], names: tuple[str, ...]) -> Call:
    """What computes the gradients on the inputs of a number; the forward passes are done here, once."""
    passes = []
    for inputs in sets:
        leaves = {name: getattr(inputs, name).detach().requires_grad_() for name in names}
        first = outputs(function(inputs._replace(**leaves)))[0]
        # Not constant: the softmax's gradient would be 0, and only rounding would be compared.
        generator = torch.Generator(first.device).manual_seed(1)
        grad = torch.randn(first.shape, generator=generator, device=first.device, dtype=first.dtype)
        passes.append((first, list(leaves.values()), grad))
    return lambda number: torch.autograd.grad(*passes[number][:2], passes[number][2], retain_graph=True)


def check(name: str, actual: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    """Raise AssertionError where a candidate's result is not what the reference gives."""
    for a, b in zip(actual, expected, strict=True):
        if not b.is_floating_point():
            differ = float((a != b).float().mean()) if a.numel() else 0.0
            assert differ <= ROUNDED.get(name.partition(" ")[0], 0), (
                f"{name}: other tokens were kept or merged"
            )
            continue
        error, largest = float((a.float() - b.float()).abs().max()), float(b.float().abs().max())
        assert error <= tolerance * largest, f"{name}: off by {error:.2e}, the largest is {largest:.2e}"


class Clock:
    """Times calls on a stream of a GPU by events; on the CPU, where it is only tested, by the wall clock."""

    def __init__(self, device: str) -> None:
        self.stream = torch.cuda.Stream() if device == "cuda" else None

    def replayed(self, call: Call, count: int, repeats: int) -> Callable[[], float]:
        """Return what gives the seconds of one call in a CUDA graph of many, over `count` inputs in turn."""
        if self.stream is None:
            return self.called(call, count, repeats)
        call(0)
        graph = torch.cuda.CUDAGraph()
        # Kept until its turn comes again: a result that is freed at once gives its memory to the next one,
        # whose writes then stay in the cache.
        results: list[Any] = [None] * count
        with torch.cuda.graph(graph, stream=self.stream):
            for number in range(repeats):
                results[number % count] = call(number % count)
        graph.replay()
        return lambda: self._seconds(graph.replay) / repeats

    def called(self, call: Call, count: int, repeats: int) -> Callable[[], float]:
        """Return what gives the seconds of one call from Python."""

        def run() -> None:
            for number in range(repeats):
                call(number % count)

        return lambda: self._seconds(run) / repeats

    def _seconds(self, run: Callable[[], object]) -> float:
        if self.stream is None:
            start = time.perf_counter()
            run()
            return time.perf_counter() - start
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record(self.stream)
        run()
        last.record(self.stream)
        last.synchronize()
        return first.elapsed_time(last) / 1e3


def in_turns(timers: dict[str, Callable[[], float]], seconds: float) -> dict[str, float]:
    """Return the median of each timer, in rounds in which each has one turn; at least five rounds."""
    times: dict[str, list[float]] = {name: [] for name in timers}
    end = time.perf_counter() + seconds
    while len(times[next(iter(times))]) < 5 or time.perf_counter() < end:
        for name, timer in timers.items():
            times[name].append(timer())
    return {name: statistics.median(values) for name, values in times.items()}


class Measurement(NamedTuple):
    """One model, batch size and dtype, with or without compiled chains."""

    model: str
    batch: int
    dtype: torch.dtype
    compiled: bool
    seconds: float  # for each operator
    cache_bytes: int  # what the rotating inputs take together
    device: str = "cuda"

    def __str__(self) -> str:
        return f"{self.model}, batch {self.batch}, {self.dtype}{', compiled' if self.compiled else ''}"


def measure(given: Measurement) -> tuple[list[dict[str, Any]], list[str]]:
    """Return a row for each operator and direction, and the operators that failed or were wrong."""
    model = MODELS[given.model]
    # A compiled backward pass otherwise writes into what the forward pass has saved, and runs only once.
    torch._functorch.config.donated_buffer = False
    torch.backends.cuda.matmul.allow_tf32 = False
    torch._dynamo.reset()  # or it gives up compiling after so many shapes
    clock = Clock(given.device)
    size = make_inputs(model, given.batch, given.dtype, given.device, 0).x.nbytes
    count = max(2, math.ceil(given.cache_bytes / size))
    rows: list[dict[str, Any]] = []
    failures: list[str] = []
    with torch.cuda.stream(clock.stream):
        sets = [make_inputs(model, given.batch, given.dtype, given.device, seed) for seed in range(count)]
        for operation in operations(model):
            if not operation.compiled and given.batch != PARTS_BATCH:
                continue
            for is_backward in (False, True) if operation.moved_backward else (False,):
                name = f"{operation.name} {'backward' if is_backward else 'forward'}"
                try:
                    taken = time_one(clock, operation, is_backward, sets, given, failures)
                except Exception as error:  # the others' figures are not to be lost with it
                    failures.append(f"{name}: {first_line(error)}")
                    continue
                moved = (operation.moved_backward if is_backward else operation.moved)(sets[0])  # type: ignore[misc]
                rows.append(
                    {
                        "model": given.model,
                        "batch": given.batch,
                        "dtype": str(given.dtype).removeprefix("torch."),
                        "operator": name,
                        "bytes": moved,
                        "copy_gigabytes_per_second": round(2 * size / taken["copy"] / 1e9, 1),
                        "gigabytes_per_second": round(moved / taken["ours, replayed"] / 1e9, 1),
                        "microseconds": {key: round(value * 1e6, 2) for key, value in taken.items()},
                    }
                )
    return rows, failures


def time_one(
    clock: Clock,
    operation: Operation,
    is_backward: bool,
    sets: list[Inputs],
    given: Measurement,
    failures: list[str],
) -> dict[str, float]:
    """Return the seconds of each candidate. Raises if the operator is wrong; a wrong chain is a failure."""

    def candidate(lib: Any, sets: list[Inputs], compiled: bool = False) -> Call:
        def function(t: Inputs) -> Any:
            return operation.run(lib, t)

        if compiled:
            function = torch.compile(function, dynamic=False, backend=BACKEND)
        return backward(function, sets, operation.leaves) if is_backward else forward(function, sets)

    count = len(sets)
    # So many that a replay takes about a millisecond, next to which its own start does not count.
    repeats = max(count, min(1000, math.ceil(2e9 / sets[0].x.nbytes)))
    copies = [torch.empty_like(inputs.x) for inputs in sets]
    timers = {"copy": clock.replayed(lambda number: copies[number].copy_(sets[number].x), count, repeats)}
    expected = outputs(candidate(ops.reference, sets[:1])(0))
    for name, lib in (("ours", ops), ("eager", chains), ("compiled", chains)):
        if name == "compiled" and not (given.compiled and operation.compiled):
            continue
        try:
            call = candidate(lib, sets, name == "compiled")
            check(name, outputs(call(0)), expected, TOLERANCE[given.dtype] * (1 if name == "ours" else 5))
        except Exception as error:
            if name == "ours":
                raise
            failures.append(f"{operation.name}: {first_line(error)}")
            continue
        # The eager chain is replayed too if it is what runs in the kernel's place.
        if name != "eager" or operation.name == "attention_with_scores":
            timers[f"{name}, replayed"] = clock.replayed(call, count, repeats)
        timers[f"{name}, called"] = clock.called(call, count, min(64, max(count, 16)))
    return in_turns(timers, given.seconds)


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows in Markdown. Replayed: from a CUDA graph; called: from Python."""
    others = ("compiled, replayed", "eager, replayed", "eager, called", "compiled, called")
    lines = ["| model | batch | dtype | operator | replayed: µs | GB/s | of a copy's | called: µs | "]
    lines[0] += " | ".join(f"{name}: µs (times)" for name in others) + " |"
    lines.append("|" + "---|" * 12)
    for row in rows:
        micro, rate = row["microseconds"], row["gigabytes_per_second"]
        cells = [row["model"], row["batch"], row["dtype"], row["operator"], f"{micro['ours, replayed']:.1f}"]
        cells += [
            f"{rate:.0f}",
            f"{rate / row['copy_gigabytes_per_second']:.0%}",
            f"{micro['ours, called']:.1f}",
        ]
        for name in others:
            ours = micro[f"ours, {name.split(', ')[1]}"]
            cells.append(f"{micro[name]:.1f} ({micro[name] / ours:.1f})" if name in micro else "–")
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"
