"""`scatter_tokens`: put rows in their places in a token tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from evit_ext.ops import checks, library, reference


def scatter_tokens(x: Tensor, index: Tensor, num_tokens: int) -> Tensor:
    """Return zeros with the tokens of `x` added at `index`: ``out[b, index[b, i]] += x[b, i]``.

    Args:
        x: tokens [B, K, C], float32, float16, bfloat16 or float64, any strides.
        index: places [B, K], int64, each in [0, num_tokens); tokens with equal places add up, in float32
            (float64 for float64) and in ascending order of i, so the result does not change from run to run.
        num_tokens: number of rows of the result, at least 0.

    Returns:
        [B, num_tokens, C], contiguous, dtype of `x`.

    Differentiable in `x`, any number of times: its gradient is :func:`gather_tokens`.

    Raises:
        TypeError: the dtype of `x` is not supported, `index` is not int64 or `num_tokens` is not an int.
        ValueError: shapes or devices do not match, or `num_tokens` is negative.
        IndexError: an index is out of range (CPU tensors, outside of tracing).
    """
    checks.scatter_tokens(x, index, num_tokens)
    if not library.runs_kernel(x):
        return reference.scatter_tokens(x, index, num_tokens)
    return torch.ops.evit.scatter_tokens(x, index, num_tokens)


@torch.library.register_fake("evit::scatter_tokens")
def _fake(x: Tensor, index: Tensor, num_tokens: int) -> Tensor:
    checks.scatter_tokens(x, index, num_tokens)
    return x.new_empty((x.shape[0], num_tokens, x.shape[2]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    (index,) = ctx.saved_tensors
    return torch.ops.evit.gather_tokens(grad, index), None, None


torch.library.register_autograd("evit::scatter_tokens", _backward, setup_context=_setup_context)
