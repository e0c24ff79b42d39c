"""`mean_attention`: how much all tokens attend to every token, for models without a class token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from evit_ext.ops import checks, reference

#: Number of queries whose attention is computed at a time.
BLOCK = 128


def mean_attention(q: Tensor, k: Tensor, scale: float | None = None) -> Tensor:
    """Return the attention that every token receives, averaged over queries and heads.

    ``scores[b, n] = mean_h mean_m softmax_n(q[b, h, m] · k[b, h, n] * scale)``. This ranks the patches of
    models without a class token, instead of :func:`class_attention`.

    It is computed with PyTorch's operators for blocks of 128 queries, in the backward pass too, so the N × N
    map is never in memory. But unlike with :func:`class_attention`, the whole map is computed, in addition to
    the attention itself.

    Args:
        q: the queries of all tokens, [B, H, M, D], float32, float16, bfloat16 or float64, any strides.
        k: their keys, [B, H, N, D], dtype and device of `q`.
        scale: factor of the products; default ``D ** -0.5``.

    Returns:
        scores [B, N], float32 (float64 for float64 inputs). They sum to 1 over N.

    Under autocast `q` and `k` are cast to the autocast dtype, as scaled_dot_product_attention casts them.
    Differentiable once, in `q` and `k`.

    Raises:
        TypeError: a dtype is not supported, or `q` and `k` differ in dtype.
        ValueError: shapes or devices do not match.
    """
    q, k = checks.autocast(q, k)
    scale = checks.mean_attention(q, k, scale)
    # So does torch.compile get the plain formula, an export not.
    if torch.compiler.is_dynamo_compiling() or checks.in_function_transform():
        return reference.mean_attention(q, k, scale)
    return _MeanAttention.apply(q, k, scale)


def _probabilities(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Return the softmax [B, H, m, N] of a block of queries; `q` and `k` are float32 or float64."""
    return (q @ k.transpose(2, 3) * scale).softmax(dim=-1)


class _MeanAttention(torch.autograd.Function):
    @staticmethod
    def forward(q: Tensor, k: Tensor, scale: float) -> Tensor:
        dtype = checks.accumulation_dtype(k.dtype)
        scores = torch.zeros(k.shape[0], k.shape[2], dtype=dtype, device=k.device)
        with checks.without_autocast(k.device.type):
            # Cast before the products: in float16 they could overflow.
            keys = k.to(dtype)
            for block in q.split(BLOCK, dim=2):
                scores = scores + _probabilities(block.to(dtype), keys, scale).sum(dim=(1, 2))
        return scores / max(q.shape[1] * q.shape[2], 1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: Tensor) -> None:
        q, k, ctx.scale = inputs
        ctx.save_for_backward(q, k)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_scores: Tensor) -> tuple[Tensor, Tensor, None]:
        q, k = ctx.saved_tensors
        dtype = checks.accumulation_dtype(k.dtype)
        # With p the softmax of one query, d(logit n) = p_n (g_n - Σ_l p_l g_l).
        g = (grad_scores / max(q.shape[1] * q.shape[2], 1))[:, None, None, :]
        grad_q, grad_k = [], torch.zeros(k.shape, dtype=dtype, device=k.device)
        with checks.without_autocast(k.device.type):
            keys = k.to(dtype)
            for block in q.split(BLOCK, dim=2):
                queries = block.to(dtype)
                p = _probabilities(queries, keys, ctx.scale)
                grad_logits = p * (g - (p * g).sum(dim=-1, keepdim=True)) * ctx.scale
                grad_q.append((grad_logits @ keys).to(q.dtype))
                grad_k = grad_k + grad_logits.transpose(2, 3) @ queries
        return torch.cat(grad_q, dim=2), grad_k.to(k.dtype), None
