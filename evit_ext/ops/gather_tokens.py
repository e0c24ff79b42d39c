"""`gather_tokens`: pick rows of a token tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from evit_ext.ops import checks, library, reference


def gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    """Return the tokens of `x` at `index`: ``out[b, i] = x[b, index[b, i]]``.

    Args:
        x: tokens [B, N, C], float32, float16, bfloat16 or float64, any strides.
        index: token numbers [B, K], int64, each in [0, N); repetitions and any order are allowed.

    Returns:
        [B, K, C], contiguous, dtype of `x`.

    Differentiable in `x`, any number of times: its gradient is :func:`scatter_tokens`, so the gradients of a
    repeated token add up, deterministically.

    Raises:
        TypeError: the dtype of `x` is not supported, or `index` is not int64.
        ValueError: shapes or devices do not match.
        IndexError: an index is out of range (CPU tensors, outside of tracing).
    """
    checks.gather_tokens(x, index)
    if not library.runs_kernel(x):
        return reference.gather_tokens(x, index)
    return torch.ops.evit.gather_tokens(x, index)


@torch.library.register_fake("evit::gather_tokens")
def _fake(x: Tensor, index: Tensor) -> Tensor:
    checks.gather_tokens(x, index)
    return x.new_empty((x.shape[0], index.shape[1], x.shape[2]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, index = inputs
    ctx.num_tokens = x.shape[1]
    ctx.save_for_backward(index)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    (index,) = ctx.saved_tensors
    return torch.ops.evit.scatter_tokens(grad, index, ctx.num_tokens), None


torch.library.register_autograd("evit::gather_tokens", _backward, setup_context=_setup_context)
