"""`fuse_tokens`: the weighted sum of some tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from evit_ext.ops import checks, library, reference


def fuse_tokens(x: Tensor, weights: Tensor, index: Tensor) -> Tensor:
    """Return one token per batch entry: ``out[b] = Σ_i weights[b, index[b, i]] * x[b, index[b, i]]``.

    This is EViT's fused token (Liang et al., ICLR 2022, section 3.2) when `weights` are the class token's
    scores and `index` names the patches that are not kept. The sum is not divided by the sum of weights.

    Args:
        x: tokens [B, N, C], float32, float16, bfloat16 or float64, any strides.
        weights: [B, N], one for each token of `x`, any of these dtypes.
        index: token numbers [B, K], int64, each in [0, N); a repeated token counts once per repetition.

    Returns:
        [B, C], dtype of `x`; zeros if K is 0. Accumulated in float32 (float64 for float64 `x`).

    Differentiable once, in `x` and `weights`. Deterministic for any number of threads.

    Raises:
        TypeError: a dtype is not supported, or `index` is not int64.
        ValueError: shapes or devices do not match.
        IndexError: an index is out of range (CPU tensors, outside of tracing).
    """
    checks.fuse_tokens(x, weights, index)
    if not library.runs_kernel(x, weights):
        return reference.fuse_tokens(x, weights, index)
    return torch.ops.evit.fuse_tokens(x, weights, index)


@torch.library.register_fake("evit::fuse_tokens")
def _fake(x: Tensor, weights: Tensor, index: Tensor) -> Tensor:
    checks.fuse_tokens(x, weights, index)
    return x.new_empty((x.shape[0], x.shape[2]))


@torch.library.register_fake("evit::fuse_tokens_backward")
def _fake_backward(grad: Tensor, x: Tensor, weights: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    checks.fuse_tokens(x, weights, index)
    checks.same_device("grad", grad, "x", x)
    return x.new_empty(x.shape), weights.new_empty(weights.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    grad_x, grad_weights = torch.ops.evit.fuse_tokens_backward(grad, *ctx.saved_tensors)
    return grad_x, grad_weights, None


torch.library.register_autograd("evit::fuse_tokens", _backward, setup_context=_setup_context)
library.refuse_double_backward("fuse_tokens")
