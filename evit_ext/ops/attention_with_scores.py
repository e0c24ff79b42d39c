"""`attention_with_scores`: multi-head attention and the class token's scores."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from evit_ext.ops import checks, library, reference
from evit_ext.ops.class_attention import class_attention
from evit_ext.ops.mean_attention import mean_attention


def attention_with_scores(
    qkv: Tensor,
    num_heads: int,
    scale: float | None = None,
    key_bias: Tensor | None = None,
    mean: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return the attention of all tokens to all, and how much the class token attends to each.

    This is what an EViT block computes from its projection (Liang et al., ICLR 2022, section 3.2)::

        q, k, v = qkv.unflatten(2, (3, num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        out = scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).flatten(2)
        scores = class_attention(q[:, :, 0], k, scale)

    A bias of the keys is added to the logits of every query and head, also to those of the scores. With the
    logarithm of the number of patches that each token stands for, this is the proportional attention of ToMe
    (Bolya et al., ICLR 2023, equation 1); with -Inf, a key is masked.

    The CPU has forward and backward kernels that read the projection in place and never store an N × N map:
    the backward pass computes the probabilities again. On other devices these steps run instead, and so they
    do in the dtypes that PyTorch's attention computes on tiles (``evit_ext.ops.library.TILED``: bfloat16 on
    processors with AMX), which is faster than the kernel, unless `mean` is asked for. There is also a CUDA
    kernel without gradient, for float16 and bfloat16 with 32, 64 or 128 channels per head, but it has not
    been measured and is used only if ``evit_ext.ops.library.CUDA_ATTENTION`` is set. Models that change
    queries or keys between the projection and the attention (norms, rotary embeddings) cannot use this
    operator.

    Args:
        qkv: the packed projection [B, N, 3 * C] of tokens, the class token first, as timm's ``qkv`` layer
            returns it: queries, keys and values, each ordered (H, D). float32, float16, bfloat16 or float64;
            any strides (only a tensor with a strided last dimension is copied first); N may be 0.
        num_heads: H, a divisor of C.
        scale: factor of the dot products; default ``D ** -0.5``.
        key_bias: added to the scaled products with each key, [B, N], float32, float16, bfloat16 or float64,
            any strides. It is used in float32 (float64 for float64 `qkv`).
        mean: return the scores of :func:`mean_attention`, those of all tokens on average, for models without
            a class token. On the CPU they take no second pass over the map.

    Returns:
        out [B, N, C], dtype of `qkv`, heads one after the other; and scores [B, N], float32 (float64 for
        float64 `qkv`), which sum to 1 over N and, without a bias, are bit-identical to those of
        :func:`class_attention`.

    Products are summed in float32 (float64 for float64). In bfloat16, on processors with bfloat16 products
    (``avx512_bf16``), the probabilities are rounded to bfloat16 before they are multiplied with the values,
    as in PyTorch's scaled_dot_product_attention, and so are the gradients of the logits; `scores` are not
    rounded, except that those with `mean` are the mean of rounded probabilities. The CUDA kernel always
    rounds probabilities but no `scores`, which agree with those of `class_attention` or `mean_attention` up
    to float32 rounding. Where PyTorch's attention runs instead of a kernel, it takes the bias in the dtype of
    `qkv`; the scores do not. Under autocast `qkv` is cast as scaled_dot_product_attention casts its inputs,
    the bias is not. Differentiable once, in `qkv` and `key_bias`. The kernels are deterministic for any
    number of threads.

    Raises:
        TypeError: a dtype is not supported, `num_heads` is not an int, `scale` not a number or `mean` not a
            bool.
        ValueError: the shape does not fit `num_heads`, or that of `key_bias` or its device not `qkv`.
    """
    qkv = checks.autocast_one(qkv)
    scale = checks.attention_with_scores(qkv, num_heads, scale, key_bias, mean)
    if not (library.runs_kernel(qkv) if key_bias is None else library.runs_kernel(qkv, key_bias)):
        return reference.attention_with_scores(qkv, num_heads, scale, key_bias, mean)
    if not _kernel_takes(qkv, num_heads, key_bias, mean):
        return _composed(qkv, num_heads, scale, key_bias, mean)
    return torch.ops.evit.attention_with_scores(qkv, num_heads, scale, key_bias, mean)


def _kernel_takes(qkv: Tensor, num_heads: int, key_bias: Tensor | None, mean: bool) -> bool:
    if qkv.device.type == "meta":
        return True
    if qkv.device.type == "cpu":
        # Mean scores would take PyTorch's attention a second pass.
        return mean or qkv.dtype not in library.TILED
    if not library.CUDA_ATTENTION or library.needs_gradient(qkv, key_bias):
        return False
    narrow = qkv.dtype in (torch.float16, torch.bfloat16)
    return narrow and qkv.shape[2] // (3 * num_heads) in (32, 64, 128)


def _composed(
    qkv: Tensor, num_heads: int, scale: float, key_bias: Tensor | None, mean: bool
) -> tuple[Tensor, Tensor]:
    if qkv.shape[1] == 0:
        return reference.attention_with_scores(qkv, num_heads, scale, key_bias, mean)
    q, k, v = reference.unpacked(qkv, num_heads)
    mask = None if key_bias is None else key_bias.to(qkv.dtype)[:, None, None]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2).flatten(2)
    if key_bias is None:
        scores = mean_attention(q, k, scale) if mean else class_attention(q[:, :, 0], k, scale)
        return out.contiguous(), scores
    dtype = checks.accumulation_dtype(qkv.dtype)
    if mean:
        # The bias as one more channel, in which all queries are 1.
        with checks.without_autocast(qkv.device.type):
            biases = key_bias.to(dtype)[:, None, :, None].expand(-1, num_heads, -1, 1)
            queries = torch.cat([q.to(dtype) * scale, torch.ones_like(biases)], dim=3)
            return out.contiguous(), mean_attention(queries, torch.cat([k.to(dtype), biases], dim=3), 1.0)
    # One row of the map.
    with checks.without_autocast(qkv.device.type):
        row = (k.to(dtype) @ q[:, :, 0].to(dtype).unsqueeze(-1)).squeeze(-1) * scale
        return out.contiguous(), (row + key_bias.to(dtype)[:, None]).softmax(dim=-1).mean(dim=1)


@torch.library.register_fake("evit::attention_with_scores")
def _fake(
    qkv: Tensor, num_heads: int, scale: float, key_bias: Tensor | None = None, mean: bool = False
) -> tuple[Tensor, Tensor]:
    checks.attention_with_scores(qkv, num_heads, scale, key_bias, mean)
    batch, num_tokens, width = qkv.shape
    scores = qkv.new_empty((batch, num_tokens), dtype=checks.accumulation_dtype(qkv.dtype))
    return qkv.new_empty((batch, num_tokens, width // 3)), scores


@torch.library.register_fake("evit::attention_with_scores_backward")
def _fake_backward(
    grad_out: Tensor,
    grad_scores: Tensor,
    qkv: Tensor,
    num_heads: int,
    scale: float,
    key_bias: Tensor | None = None,
    mean: bool = False,
) -> tuple[Tensor, Tensor]:
    checks.attention_with_scores(qkv, num_heads, scale, key_bias, mean)
    checks.same_device("grad_out", grad_out, "qkv", qkv)
    if key_bias is None:  # no gradient: a tensor without an element
        dtype = checks.accumulation_dtype(qkv.dtype)
        return qkv.new_empty(qkv.shape), qkv.new_empty((qkv.shape[0], 0), dtype=dtype)
    return qkv.new_empty(qkv.shape), key_bias.new_empty(key_bias.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, ctx.num_heads, ctx.scale, key_bias, ctx.mean = inputs
    ctx.save_for_backward(qkv, key_bias)


def _backward(
    ctx: Any, grad_out: Tensor, grad_scores: Tensor
) -> tuple[Tensor, None, None, Tensor | None, None]:
    qkv, key_bias = ctx.saved_tensors
    grad_qkv, grad_key_bias = torch.ops.evit.attention_with_scores_backward(
        grad_out, grad_scores, qkv, ctx.num_heads, ctx.scale, key_bias, ctx.mean
    )
    return grad_qkv, None, None, None if key_bias is None else grad_key_bias, None


torch.library.register_autograd("evit::attention_with_scores", _backward, setup_context=_setup_context)
library.refuse_double_backward("attention_with_scores")


@register_flop_formula(torch.ops.evit.attention_with_scores)
def _flops(qkv_shape: Any, *arguments: Any, out_shape: Any = None, **named: Any) -> int:
    """Return the floating-point operations of both products, counted as PyTorch does for its attention."""
    batch, num_tokens, width = qkv_shape
    return 4 * batch * num_tokens**2 * (width // 3)


@register_flop_formula(torch.ops.evit.attention_with_scores_backward)
def _backward_flops(
    grad_out_shape: Any, grad_scores_shape: Any, qkv_shape: Any, *arguments: Any, **named: Any
) -> int:
    """Return those of five products, counted as PyTorch does for its attention's backward."""
    batch, num_tokens, width = qkv_shape
    return 10 * batch * num_tokens**2 * (width // 3)
