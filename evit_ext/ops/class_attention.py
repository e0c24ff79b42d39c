"""`class_attention`: how much the class token attends to every token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from evit_ext.ops import checks, library, reference


def class_attention(
    q: Tensor, k: Tensor, scale: float | None = None, logsumexp: Tensor | None = None
) -> Tensor:
    """Return the attention of one query to all tokens, averaged over heads.

    ``scores[b, n] = mean_h softmax_n(q[b, h] · k[b, h, n] * scale)``. With the class token's query, this is
    how much it attends to each token; EViT (Liang et al., ICLR 2022, section 3.2) ranks the patches by it.
    The N × N attention map is never formed, and the backward pass computes the softmax again from `q` and
    `k`.

    Args:
        q: the class token's query, [B, H, D], float32, float16, bfloat16 or float64, any strides.
        k: the keys of all tokens, [B, H, N, D], dtype and device of `q`, any strides. A slice of a packed
            qkv projection is read in place; only a tensor with a strided last dimension is copied first.
        scale: factor of the dot products; default ``D ** -0.5``.
        logsumexp: [B, H], float32 (float64 for float64 inputs), any strides:
            ``log Σ_n exp(q[b, h] · k[b, h, n] * scale)``, natural logarithm, as attention kernels return it
            for the class token's query. The softmax is then ``exp(q · k * scale - logsumexp)``, without
            computing its maximum or sum. The value is trusted: a wrong one gives scores that do not sum
            to 1. Autograd treats it as a constant, but no gradient is lost: the result is differentiated as
            if it had been computed from `q` and `k` alone.

    Returns:
        scores [B, N], float32 (float64 for float64 inputs). They sum to 1 over N.

    Under autocast `q` and `k` are cast to the autocast dtype, as scaled_dot_product_attention casts them.
    Differentiable once, in `q` and `k` (the reference any number of times). Deterministic for any number of
    threads.

    Raises:
        TypeError: a dtype is not supported, `q` and `k` differ in dtype, or `logsumexp` does not have the
            dtype that theirs requires.
        ValueError: shapes or devices do not match.
    """
    q, k = checks.autocast(q, k)
    scale = checks.class_attention(q, k, scale, logsumexp)
    if not library.runs_kernel(q, k):
        return reference.class_attention(q, k, scale, logsumexp)
    return torch.ops.evit.class_attention(q, k, scale, logsumexp)


@torch.library.register_fake("evit::class_attention")
def _fake(q: Tensor, k: Tensor, scale: float, logsumexp: Tensor | None = None) -> Tensor:
    checks.class_attention(q, k, scale, logsumexp)
    return k.new_empty((k.shape[0], k.shape[2]), dtype=checks.accumulation_dtype(k.dtype))


@torch.library.register_fake("evit::class_attention_backward")
def _fake_backward(grad_scores: Tensor, q: Tensor, k: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    checks.class_attention(q, k, scale)
    checks.same_device("grad_scores", grad_scores, "k", k)
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, ctx.scale, _ = inputs
    ctx.save_for_backward(q, k)


def _backward(ctx: Any, grad_scores: Tensor) -> tuple[Tensor, Tensor, None, None]:
    q, k = ctx.saved_tensors
    grad_q, grad_k = torch.ops.evit.class_attention_backward(grad_scores, q, k, ctx.scale)
    return grad_q, grad_k, None, None


torch.library.register_autograd("evit::class_attention", _backward, setup_context=_setup_context)
library.refuse_double_backward("class_attention")
