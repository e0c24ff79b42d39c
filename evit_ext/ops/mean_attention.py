"""`mean_attention`: how much all tokens attend to every token, for models without a class token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from evit_ext.ops import checks, library, reference

#: Number of queries whose attention is computed at a time where no kernel is.
BLOCK = 128


def mean_attention(q: Tensor, k: Tensor, scale: float | None = None) -> Tensor:
    """Return the attention that every token receives, averaged over queries and heads.

    ``scores[b, n] = mean_h mean_m softmax_n(q[b, h, m] · k[b, h, n] * scale)``. This ranks the patches of
    models without a class token, instead of :func:`class_attention`.

    Unlike with :func:`class_attention`, the whole map is computed, in addition to the attention itself;
    :func:`attention_with_scores` with ``mean=True`` computes it once for both on the CPU. CPU and CUDA have
    forward and backward kernels that read slices of a packed projection in place. On other devices PyTorch's
    operators compute it for blocks of 128 queries. The M × N map is never in memory, in the backward pass
    neither.

    Args:
        q: the queries of all tokens or of some, [B, H, M, D], float32, float16, bfloat16 or float64, any
            strides.
        k: the keys, [B, H, N, D], dtype and device of `q`, any strides.
        scale: factor of the products; default ``D ** -0.5``.

    Returns:
        scores [B, N], float32 (float64 for float64 inputs). They sum to 1 over N.

    Products are summed in float32 (float64 for float64). On CUDA in 16 bits, and on processors with
    bfloat16 products (``avx512_bf16``) in bfloat16, the gradients of the logits are rounded to the dtype of
    the inputs before they are multiplied; on CUDA in such a scale that float16 loses none. Under autocast
    `q` and `k` are cast to the autocast dtype, as scaled_dot_product_attention casts them. Differentiable
    once, in `q` and `k` (the reference any number of times). The kernels are deterministic for any number
    of threads.

    Raises:
        TypeError: a dtype is not supported, or `q` and `k` differ in dtype.
        ValueError: shapes or devices do not match.
    """
    q, k = checks.autocast(q, k)
    scale = checks.mean_attention(q, k, scale)
    if library.wants_reference(q, k):
        return reference.mean_attention(q, k, scale)
    if k.device.type in library.KERNEL_DEVICES:
        return torch.ops.evit.mean_attention(q, k, scale)
    # So does torch.compile get the plain formula, an export not.
    if torch.compiler.is_dynamo_compiling():
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


@torch.library.register_fake("evit::mean_attention")
def _fake(q: Tensor, k: Tensor, scale: float) -> Tensor:
    checks.mean_attention(q, k, scale)
    return k.new_empty((k.shape[0], k.shape[2]), dtype=checks.accumulation_dtype(k.dtype))


@torch.library.register_fake("evit::mean_attention_backward")
def _fake_backward(grad_scores: Tensor, q: Tensor, k: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    checks.mean_attention(q, k, scale)
    checks.same_device("grad_scores", grad_scores, "k", k)
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, ctx.scale = inputs
    ctx.save_for_backward(q, k)


def _backward(ctx: Any, grad_scores: Tensor) -> tuple[Tensor, Tensor, None]:
    q, k = ctx.saved_tensors
    grad_q, grad_k = torch.ops.evit.mean_attention_backward(grad_scores, q, k, ctx.scale)
    return grad_q, grad_k, None


torch.library.register_autograd("evit::mean_attention", _backward, setup_context=_setup_context)
library.refuse_double_backward("mean_attention")


@register_flop_formula(torch.ops.evit.mean_attention)
def _flops(q_shape: Any, k_shape: Any, *arguments: Any, out_shape: Any = None, **named: Any) -> int:
    """Return the floating-point operations of the product."""
    batch, heads, queries, channels = q_shape
    return 2 * batch * heads * queries * k_shape[2] * channels


@register_flop_formula(torch.ops.evit.mean_attention_backward)
def _backward_flops(
    grad_shape: Any, q_shape: Any, k_shape: Any, *arguments: Any, out_shape: Any = None, **named: Any
) -> int:
    """Return those of the product again, and of two more."""
    return 3 * _flops(q_shape, k_shape)
