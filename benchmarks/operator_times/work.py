"""What is timed on a GPU: each operator next to the published method's chain, eager and compiled."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from evit_ext import ops

from . import chains
from .clocks import Call, Clock, interleaved
from .facts import KEEP_RATE, MODELS

# Error allowed, relative to the largest value expected: of the operators, and of the chains, which form their
# sums and products in the dtype itself.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 2e-2}
CHAIN_SLACK = 5


@dataclass
class Inputs:
    """Tensors of one EViT block."""

    qkv: Tensor  # a packed projection [B, N, 3 * H * D]
    q: Tensor  # [B, H, D] and k [B, H, N, D]: slices of it, as in a model
    k: Tensor
    x: Tensor
    branch: Tensor
    scores: Tensor
    index: Tensor  # the kept tokens, by their number among all
    rows: Tensor  # these tokens
    weight: Tensor
    bias: Tensor
    copy: Tensor


def make_inputs(
    model: tuple[int, int, int], batch: int, dtype: torch.dtype, device: str, seed: int
) -> Inputs:
    """Random tensors. The scores are all different: how ties are broken is not the same everywhere."""
    heads, tokens, channels = model
    generator = torch.Generator(device).manual_seed(seed)
    random = partial(torch.randn, generator=generator, device=device, dtype=dtype)
    width = heads * channels
    qkv = random(batch, tokens, 3 * width)
    q, k, _ = ops.reference.unpacked(qkv, heads)
    x, branch = random(batch, tokens, width), random(batch, tokens, width)
    weight, bias = random(width), random(width)
    ranks = torch.rand(batch, tokens, generator=generator, device=device).argsort(dim=1)
    scores = (ranks + 1).float() * (2 / (tokens * (tokens + 1)))
    index = ops.reference.reorganize_tokens(x[:, :, :1], scores, num_keep_of(tokens))[1] + 1
    rows = chains.gather_tokens(x, index)
    return Inputs(qkv, q[:, :, 0], k, x, branch, scores, index, rows, weight, bias, x.clone())


def num_keep_of(tokens: int) -> int:
    return math.ceil(KEEP_RATE * (tokens - 1))


def nbytes(*tensors: Tensor) -> int:
    return sum(tensor.nbytes for tensor in tensors)


@dataclass(frozen=True)
class Operation:
    """An operator, its chain and its definition, and the bytes that it must move."""

    name: str
    arguments: Callable[[Inputs], tuple[Tensor, ...]]
    ours: Callable[..., Any]
    reference: Callable[..., Any]
    #: Each input that is needed read once, each output written once: from the inputs and the outputs.
    moved: Callable[[Inputs, list[Tensor]], int]
    chain: Callable[..., Any] | None = None
    #: The same for the gradients, which come last.
    moved_backward: Callable[[Inputs, list[Tensor], list[Tensor]], int] | None = None
    #: Which arguments have a gradient.
    leaves: tuple[int, ...] = ()
    compiled: bool = False
    #: Whether the eager chain is replayed too: where it is what runs if the operator does not.
    replayed: bool = False


def attention_with_scores(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """The operator's kernel on CUDA as well, where the function of that name does not use it by itself."""
    if qkv.is_cuda and qkv.dtype.itemsize == 2:
        scale = (qkv.shape[2] // (3 * heads)) ** -0.5
        result: tuple[Tensor, Tensor] = torch.ops.evit.attention_with_scores(qkv, heads, scale)
        return result
    return ops.attention_with_scores(qkv, heads)


def operations(heads: int, tokens: int) -> list[Operation]:
    """All that is timed, for a number of heads and tokens."""
    keep = num_keep_of(tokens)
    reference = ops.reference
    return [
        Operation(
            "class_attention",
            lambda t: (t.q, t.k),
            lambda q, k: ops.class_attention(q, k),
            lambda q, k: reference.class_attention(q, k),
            lambda t, out: nbytes(t.q, t.k, *out),
            chains.class_attention,
            lambda t, out, grads: nbytes(t.q, t.k, *out, *grads),
            (0, 1),
            True,
        ),
        Operation(
            "attention_with_scores",
            lambda t: (t.qkv,),
            lambda qkv: attention_with_scores(qkv, heads),
            lambda qkv: reference.attention_with_scores(qkv, heads),
            lambda t, out: nbytes(t.qkv, *out),
            lambda qkv: chains.attention_with_scores(qkv, heads),
            compiled=True,
            replayed=True,
        ),
        Operation(
            "reorganize_tokens",
            lambda t: (t.x, t.scores),
            lambda x, s: ops.reorganize_tokens(x, s, keep),
            lambda x, s: reference.reorganize_tokens(x, s, keep),
            lambda t, out: nbytes(t.x, t.scores, *out),
            lambda x, s: chains.reorganize_tokens(x, s, keep),
            # Of x only the fused tokens are read again, for the gradient of their scores.
            lambda t, out, grads: nbytes(t.scores, *out, *grads) + nbytes(t.x[:, 1 + keep :]),
            (0, 1),
            True,
        ),
        Operation(
            "add_reorganize_norm",
            lambda t: (t.x, t.branch, t.scores, t.weight, t.bias),
            lambda x, b, s, w, v: ops.add_reorganize_norm(x, b, s, keep, w, v),
            lambda x, b, s, w, v: reference.add_reorganize_norm(x, b, s, keep, w, v),
            lambda t, out: nbytes(t.x, t.branch, t.scores, t.weight, t.bias, *out),
            lambda x, b, s, w, v: chains.add_reorganize_norm(x, b, s, keep, w, v),
            compiled=True,
        ),
        Operation(
            "stage",  # as at inference, one operator after the other
            lambda t: (t.q, t.k, t.x),
            lambda q, k, x: ops.reorganize_tokens(x, ops.class_attention(q, k), keep),
            # By the operator's own scores, which are compared above: rounding may exchange near ones.
            lambda q, k, x: reference.reorganize_tokens(x, ops.class_attention(q, k), keep),
            lambda t, out: nbytes(t.q, t.k, t.x, *out) + 2 * nbytes(t.scores),
        ),
        Operation(
            "gather_tokens",
            lambda t: (t.x, t.index),
            lambda x, i: ops.gather_tokens(x, i),
            lambda x, i: reference.gather_tokens(x, i),
            lambda t, out: nbytes(t.rows, t.index, *out),
            chains.gather_tokens,
        ),
        Operation(
            "scatter_tokens",
            lambda t: (t.rows, t.index),
            lambda x, i: ops.scatter_tokens(x, i, tokens),
            lambda x, i: reference.scatter_tokens(x, i, tokens),
            lambda t, out: nbytes(t.rows, t.index, *out),
            lambda x, i: chains.scatter_tokens(x, i, tokens),
        ),
        Operation(
            "restore_tokens",
            lambda t: (t.rows, t.index, t.x),
            lambda r, i, x: ops.restore_tokens(r, i, tokens, 0, x),
            lambda r, i, x: reference.restore_tokens(r, i, tokens, 0, x),
            # Of x only the tokens that were dropped.
            lambda t, out: nbytes(t.index, *out, *out),
            chains.restore_tokens,
        ),
        Operation(
            "fuse_tokens",
            lambda t: (t.x, t.scores, t.index),
            lambda x, s, i: ops.fuse_tokens(x, s, i),
            lambda x, s, i: reference.fuse_tokens(x, s, i),
            lambda t, out: nbytes(t.rows, t.scores[:, :keep], t.index, *out),
            chains.fuse_tokens,
        ),
    ]


#: What moves rows and nothing else, or is a part of another operator, is timed once, at this batch size.
PARTS = {"gather_tokens", "scatter_tokens", "restore_tokens", "fuse_tokens"}
PARTS_BATCH = 256


def outputs(result: Any) -> list[Tensor]:
    return list(result) if isinstance(result, (tuple, list)) else [result]


def differentiated(operation: Operation, function: Callable[..., Any], sets: list[Inputs]) -> Call:
    """The gradients on the inputs of a number; the forward passes are done here, once."""
    passes = []
    for inputs in sets:
        arguments = [
            t.detach().requires_grad_(number in operation.leaves)
            for number, t in enumerate(operation.arguments(inputs))
        ]
        first = outputs(function(*arguments))[0]
        # The same for every candidate. It varies within an entry: the softmax's gradient of a constant is 0,
        # and only rounding would be compared.
        generator = torch.Generator(first.device).manual_seed(1)
        grad = torch.randn(first.shape, generator=generator, device=first.device, dtype=first.dtype)
        passes.append((first, [arguments[number] for number in operation.leaves], grad))

    def call(number: int) -> list[Tensor]:
        first, leaves, grad = passes[number]
        return list(torch.autograd.grad(first, leaves, grad, retain_graph=True))

    return call


def check(name: str, actual: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    """Raise AssertionError where a candidate's result is not what the reference gives."""
    for a, b in zip(actual, expected, strict=True):
        if not b.is_floating_point():
            assert torch.equal(a, b), f"{name}: other tokens were kept"
            continue
        error = float((a.float() - b.float()).abs().max())
        bound = tolerance * float(b.float().abs().max())
        assert error <= bound, f"{name}: off by {error:.2e}, allowed are {bound:.2e}"  # not for NaN either


def candidates(
    operation: Operation,
    direction: str,
    sets: list[Inputs],
    dtype: torch.dtype,
    compiled: Callable[..., Any] | None,
    failures: list[str],
) -> tuple[dict[str, Call], list[Tensor], list[Tensor]]:
    """The calls that are compared, checked; outputs and gradients of the reference, for their sizes.

    Raises where the operator fails or is wrong; a chain that does is left out, which `failures` then says.
    """
    functions = {"ours": operation.ours, "eager": operation.chain, "compiled": compiled}
    there = {name: function for name, function in functions.items() if function is not None}
    with torch.no_grad():
        expected = out = outputs(operation.reference(*operation.arguments(sets[0])))
    if direction == "backward":
        expected = differentiated(operation, operation.reference, sets[:1])(0)
    calls: dict[str, Call] = {}
    for name, function in there.items():
        slack = 1 if name == "ours" else CHAIN_SLACK
        try:
            if direction == "backward":
                call: Call = differentiated(operation, function, sets)
            else:
                call = partial(_forward, operation, function, sets)
            check(name, outputs(call(0)), expected, TOLERANCE[dtype] * slack)
        except Exception as error:
            if name == "ours":
                raise
            failures.append(f"{operation.name} {direction}: {first_line(error)}")
        else:
            calls[name] = call
    return calls, out, expected if direction == "backward" else []


@torch.no_grad()
def _forward(operation: Operation, function: Callable[..., Any], sets: list[Inputs], number: int) -> Any:
    return function(*operation.arguments(sets[number]))


def measure(
    clock: Clock,
    model: str,
    batch: int,
    dtype: torch.dtype,
    device: str,
    seconds: float,
    cache_bytes: int,
    compiler: Callable[[Callable[..., Any]], Callable[..., Any]] | None,
) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of one model, batch size and dtype, and what failed; `compiler` is torch.compile, or None."""
    heads, tokens, channels = MODELS[model]
    once = batch * tokens * heads * channels * dtype.itemsize
    count = max(2, math.ceil(cache_bytes / once))
    sets = [make_inputs(MODELS[model], batch, dtype, device, seed) for seed in range(count)]
    rows: list[dict[str, Any]] = []
    failures: list[str] = []
    for operation in operations(heads, tokens):
        if operation.name in PARTS and batch != PARTS_BATCH:
            continue
        compiled = compiler(operation.chain) if compiler and operation.compiled and operation.chain else None
        for direction in ("forward", "backward") if operation.moved_backward else ("forward",):
            try:
                taken, moved = time_one(clock, operation, direction, sets, dtype, seconds, compiled, failures)
            except Exception as error:  # the others' figures are not to be lost with it
                failures.append(f"{operation.name} {direction}: {first_line(error)}")
            else:
                rows.append(row(model, batch, dtype, operation.name, direction, taken, moved, 2 * once))
    return rows, failures


def time_one(
    clock: Clock,
    operation: Operation,
    direction: str,
    sets: list[Inputs],
    dtype: torch.dtype,
    seconds: float,
    compiled: Callable[..., Any] | None,
    failures: list[str],
) -> tuple[dict[str, float], int]:
    """Seconds of each candidate, and the bytes that the operation must move."""
    calls, out, grads = candidates(operation, direction, sets, dtype, compiled, failures)
    count = len(sets)
    # So many that a replay takes about a millisecond, next to which its own start does not count.
    repeats = max(count, min(1000, math.ceil(2e9 / sets[0].x.nbytes)))
    some = min(64, max(count, 16))
    timers = {"copy": clock.replayed(lambda n: sets[n].copy.copy_(sets[n].x), count, repeats)}
    for name, call in calls.items():
        if name != "eager" or operation.replayed:
            timers[f"{name}, replayed"] = clock.replayed(call, count, repeats)
        timers[f"{name}, called"] = clock.called(call, count, some)
    if operation.moved_backward and direction == "backward":
        moved = operation.moved_backward(sets[0], out, grads)
    else:
        moved = operation.moved(sets[0], out)
    return interleaved(timers, seconds), moved


def first_line(error: Exception) -> str:
    """Type and first line of an error."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def row(
    model: str,
    batch: int,
    dtype: torch.dtype,
    operator: str,
    direction: str,
    taken: dict[str, float],
    moved: int,
    copied: int,
) -> dict[str, Any]:
    """One row of the results."""
    return {
        "model": model,
        "batch": batch,
        "dtype": str(dtype).removeprefix("torch."),
        "operator": operator,
        "direction": direction,
        "bytes": moved,
        "microseconds": {name: round(value * 1e6, 2) for name, value in taken.items()},
        "gigabytes_per_second": {
            "copy": round(copied / taken["copy"] / 1e9, 1),
            "ours": round(moved / taken["ours, replayed"] / 1e9, 1),
        },
    }


def copy_bandwidth(clock: Clock, device: str, size: int) -> float:
    """GB/s of a large copy on the device, read and written bytes both counted."""
    # Random, as constant bytes may be moved with less power.
    source = torch.randint(256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    taken = interleaved({"copy": clock.replayed(lambda _: target.copy_(source), 1, 5)}, 0.3)
    return round(2 * size / taken["copy"] / 1e9, 1)
