"""Attention that does not see dropped tokens and knows what seeing them would change: DynamicViT's training.

Notation: B batch, T tokens, C channels, H heads, D channels a head.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evit_ext._util.wrappers import unwrapped
from evit_ext.cpu.forward import has_written_forward, is_watched
from evit_ext.cpu.replacing import is_replaced
from evit_ext.ops import checks

#: What is added to the logit of a dropped token. Its weight, of the order of exp(-64), is far below the
#: rounding of the sum it is part of, and far above underflow, so the gradient of the decision can be had from
#: it. A whole number, so that every dtype holds it.
DROPPED = -64.0


def attention_bias(mask: Tensor) -> Tensor:
    """Return what to add to attention's logits so that dropped tokens are seen by nobody but themselves.

    Attention with this bias is the published one (Rao et al., NeurIPS 2021, equation 11: the softmax's
    exponentials, times the mask for all but the token itself) and has its gradient in the mask, also at the
    tokens that are dropped, which is how a predictor learns that it should have kept one. A mask of -inf has
    no such gradient. The published code adds 1e-6 / T to each weight and 1e-6 to their sum, against a sum
    that underflows; here the softmax never sees such a sum and adds nothing, which changes weights by some
    1e-6.

    Args:
        mask: [B, T], floating point: 1 for a token that is left, 0 for one that is dropped. Prefix tokens are
            always left.

    Returns:
        [B, 1, T, T], dtype of `mask`; differentiable in `mask`.
    """
    # The published weights are mask * exp(logit). At 1, d log(mask) is d mask; at 0 the weight is
    # exp(DROPPED + logit), so for the weight's derivative to be exp(logit), the bias's is exp(-DROPPED).
    bias = torch.where(mask > 0.5, mask - 1, mask * math.exp(-DROPPED) + DROPPED)
    batch, num_tokens = mask.shape
    itself = torch.eye(num_tokens, dtype=torch.bool, device=mask.device)
    return bias[:, None, None].expand(batch, 1, num_tokens, num_tokens).masked_fill(itself, 0)


def masked_block(block: Any, x: Tensor, bias: Tensor) -> Tensor:
    """Run a block of timm with attention that `bias` is added to.

    A block that other code has a say in (hooks on it or on its attention, a forward of its own, a wrapper
    such as FSDP around it) is called as it is, with the bias as its ``attn_mask``.

    Args:
        block: a timm ``Block`` with a timm ``Attention``.
        x: tokens [B, T, C].
        bias: [B, 1, T, T], of :func:`attention_bias`.

    Returns:
        [B, T, C].

    Raises:
        RuntimeError: the block has to be called and takes no ``attn_mask``, or its attention is in float16,
            in which a mask from outside has no gradient.
    """
    if not _is_plain(block) or not _is_plain(block.attn):
        return _call(block, x, bias)
    x = x + block.drop_path1(block.ls1(_masked_attention(block.attn, block.norm1(x), bias)))
    return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))


def _is_plain(module: nn.Module) -> bool:
    """Return whether calling `module` would run nothing but the forward that timm wrote."""
    return has_written_forward(module) and is_replaced(module) and not is_watched(module)


def _call(block: nn.Module, x: Tensor, bias: Tensor) -> Tensor:
    """Return the output of `block` for `x`, with `bias` as its mask."""
    bias = checks.autocast_one(bias.to(x.dtype))
    inner = unwrapped(block)
    if bias.dtype == torch.float16:
        raise RuntimeError(
            "a DynamicViT cannot be trained in float16 while its blocks have hooks, wrappers or a forward of "
            "their own: train in bfloat16, or take those away"
        )
    if "attn_mask" not in inspect.signature(inner.forward).parameters:
        raise RuntimeError(
            f"a DynamicViT in training calls a block with hooks, a wrapper or a forward of its own as "
            f"block(x, attn_mask=...), but the forward of its {type(inner).__name__} takes no attn_mask: add "
            "the argument (timm's own blocks have it since 1.0.16), or take the change away"
        )
    return block(x, attn_mask=bias)


def _masked_attention(attention: Any, x: Tensor, bias: Tensor) -> Tensor:
    """Return timm's `Attention` of `x` [B, T, C] with `bias` added to its logits: [B, T, C]."""
    batch, num_tokens, _ = x.shape
    num_heads, head_dim = attention.num_heads, attention.head_dim
    # The gate and the output norm are younger than the oldest timm that is supported.
    gate, norm = getattr(attention, "gate", None), getattr(attention, "norm", None)
    qkv = attention.qkv(x).reshape(batch, num_tokens, 3, num_heads, head_dim)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # [B, H, T, D] each, views of qkv
    q, k = attention.q_norm(q), attention.k_norm(k)
    dropout = attention.attn_drop.p if attention.training else 0.0
    if q.dtype == torch.float16:
        # Its numbers end above exp(DROPPED), which a kernel may hand the gradient back in, and autocast would
        # go back to it.
        with torch.autocast(q.device.type, enabled=False):
            q, k, v = q.float(), k.float(), v.float()
            out = F.scaled_dot_product_attention(q, k, v, bias.float(), dropout).to(x.dtype)
    else:
        out = F.scaled_dot_product_attention(q, k, v, bias.to(q.dtype), dropout)
    out = out.transpose(1, 2).reshape(batch, num_tokens, num_heads * head_dim)
    if norm is not None:
        out = norm(out)
    if gate is not None:
        out = out * gate(x).sigmoid()
    return attention.proj_drop(attention.proj(out))
