"""`merge_tokens`: patch tokens with one owner become their weighted average."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from evit_ext.ops import checks, library, reference


def merge_tokens(
    x: Tensor, owner: Tensor, num_out: int, weights: Tensor | None = None, num_prefix_tokens: int = 1
) -> tuple[Tensor, Tensor]:
    """Return the weighted averages of the patch tokens that have one owner, and the sums of their weights.

    ``merged[b, P + m] = Σ_i weights[b, i] / totals[b, m] * x[b, P + i]`` over the patch tokens i with
    ``owner[b, i] == m``, and ``totals[b, m]`` is the sum of their weights. With the numbers of patches that
    tokens stand for as weights, this is the average of ToMe (Bolya et al., ICLR 2023, section 3.2), and
    `totals` the numbers for those that leave.

    Args:
        x: tokens [B, N, C], float32, float16, bfloat16 or float64, any strides; the first
            P = `num_prefix_tokens` are prefix tokens (class, distillation, registers), which are copied.
        owner: int64 [B, N − P], each in [0, num_out). An owner of none gets zeros.
        num_out: M, at least 1 if there are patches.
        weights: [B, N − P], any of these dtypes; by default each is 1. A token that is alone is copied,
            whatever its weight.
        num_prefix_tokens: P, in [0, N].

    Returns:
        merged [B, P + M, C], dtype of `x`, accumulated in float32 (float64 for float64 `x`) in ascending
        order and rounded once; and totals [B, M], float32 (float64).

    Differentiable once, in `x` and `weights`. Deterministic for any number of threads.

    Raises:
        TypeError: a dtype is not supported, `owner` is not int64, or a number is not an int.
        ValueError: shapes or devices do not match, or a number is out of range.
        IndexError: an owner is out of range (CPU tensors, outside of tracing).
    """
    checks.merge_tokens(x, owner, num_out, weights, num_prefix_tokens)
    given = (x,) if weights is None else (x, weights)
    if not library.runs_kernel(*given):
        return reference.merge_tokens(x, owner, num_out, weights, num_prefix_tokens)
    if weights is None:
        weights = torch.ones_like(owner, dtype=checks.accumulation_dtype(x.dtype))
    return torch.ops.evit.merge_tokens(x, owner, weights, num_out, num_prefix_tokens)


@torch.library.register_fake("evit::merge_tokens")
def _fake(
    x: Tensor, owner: Tensor, weights: Tensor, num_out: int, num_prefix_tokens: int
) -> tuple[Tensor, Tensor]:
    checks.merge_tokens(x, owner, num_out, weights, num_prefix_tokens)
    return (
        x.new_empty((x.shape[0], num_prefix_tokens + num_out, x.shape[2])),
        x.new_empty((x.shape[0], num_out), dtype=checks.accumulation_dtype(x.dtype)),
    )


@torch.library.register_fake("evit::merge_tokens_backward")
def _fake_backward(
    grad_out: Tensor, grad_totals: Tensor, x: Tensor, owner: Tensor, weights: Tensor, num_prefix_tokens: int
) -> tuple[Tensor, Tensor]:
    checks.merge_tokens(x, owner, grad_out.shape[1] - num_prefix_tokens, weights, num_prefix_tokens)
    checks.same_device("grad_out", grad_out, "x", x)
    return x.new_empty(x.shape), weights.new_empty(weights.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, owner, weights, _, ctx.num_prefix_tokens = inputs
    ctx.save_for_backward(x, owner, weights)


def _backward(ctx: Any, grad_out: Tensor, grad_totals: Tensor) -> tuple[Tensor, None, Tensor, None, None]:
    grad_x, grad_weights = torch.ops.evit.merge_tokens_backward(
        grad_out, grad_totals, *ctx.saved_tensors, ctx.num_prefix_tokens
    )
    return grad_x, None, grad_weights, None, None


torch.library.register_autograd("evit::merge_tokens", _backward, setup_context=_setup_context)
library.refuse_double_backward("merge_tokens")
