"""timm's attentions, run so that they also say how much attention every token is paid.

Notation: B batch, H heads, N tokens, P prefix tokens, C channels, D channels a head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import apply_rot_embed_cat
from torch import Tensor

from evit_ext import ops
from evit_ext.ops import checks

#: Gives the scores [B, N] of queries and keys [B, H, N, D] and an attention bias, or None.
Score = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def class_token_score(q: Tensor, k: Tensor, bias: Tensor | None) -> Tensor:
    """Return how much the first token attends to every token.

    Args:
        q, k: [B, H, N, D].
        bias: added to the scaled products, [B or 1, H, N, N], or None.

    Returns:
        [B, N], float32 (float64 for float64), summing to 1: the mean over heads.
    """
    if bias is None:
        return ops.class_attention(q[:, :, 0], k)
    # One row of the biased map. No operator: it is N products a head, and few models have a bias.
    q, k = checks.autocast(q[:, :, 0], k)
    dtype = checks.accumulation_dtype(k.dtype)
    with checks.without_autocast(k.device.type):
        # Cast before the products, as in the operator: in float16 they may be beyond its largest number.
        row = (k.to(dtype) @ q.to(dtype).unsqueeze(-1)).squeeze(-1)
        return (row * q.shape[2] ** -0.5 + bias[:, :, 0]).softmax(dim=-1).mean(dim=1)


def mean_score(q: Tensor, k: Tensor, bias: Tensor | None) -> Tensor:
    """Return how much all tokens attend to every token on average, for models without a class token.

    Arguments and result as of :func:`class_token_score`; without a bias.
    """
    assert bias is None
    return ops.mean_attention(q, k)


def project(attention: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values [B, H, N, D] of `x` [B, N, C], as timm's attentions project them."""
    batch, num_tokens, _ = x.shape
    if attention.qkv is None:
        projections = (attention.q_proj(x), attention.k_proj(x), attention.v_proj(x))
        head_dim = projections[0].shape[2] // attention.num_heads
        # Keys and values may have fewer heads.
        q, k, v = (y.unflatten(2, (y.shape[2] // head_dim, head_dim)).transpose(1, 2) for y in projections)
        return q, k, v
    if getattr(attention, "q_bias", None) is None:
        qkv = attention.qkv(x)
    else:
        bias = torch.cat((attention.q_bias, attention.k_bias, attention.v_bias))
        if attention.qkv_bias_separate:
            qkv = attention.qkv(x) + bias
        else:
            qkv = F.linear(x, attention.qkv.weight, bias)
    head_dim = qkv.shape[2] // (3 * attention.num_heads)
    qkv = qkv.reshape(batch, num_tokens, 3, attention.num_heads, head_dim)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # views of qkv, which class_attention reads in place
    return q, k, v


def attend(
    attention: Any,
    x: Tensor,
    score: Score = class_token_score,
    rope: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run one of timm's attentions on `x` and also return how much attention every token is paid.

    The output is that of the attention itself; it always goes through scaled_dot_product_attention, so no
    N × N map is formed. Hooks on `attention` itself do not run, those on its projections do.

    Args:
        attention: timm's ``Attention``, ``AttentionRope``, ``EvaAttention`` or BEiT's ``Attention``, with or
            without norms of queries and keys, output norm, gate and grouped queries.
        x: normalised tokens [B, N, C], prefix tokens first.
        score: what the scores are: :func:`class_token_score` or :func:`mean_score`.
        rope: rotary embeddings of the patch tokens, as timm's: [N - P, 2 D], or more dimensions in front that
            go with [B, H].
        bias: added to the scaled products, [B or 1, H, N, N].

    Returns:
        The attention's output [B, N, C] and the scores [B, N], float32 (float64 for float64), which sum to 1.
    """
    # What not every attention, or not every version of timm, has.
    q_norm, k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
    gate, norm = getattr(attention, "gate", None), getattr(attention, "norm", None)
    q, k, v = project(attention, x)
    if q_norm is not None and k_norm is not None:
        q, k = q_norm(q), k_norm(k)
    if rope is not None:
        prefix = attention.num_prefix_tokens
        # An older timm knows no halves.
        half = (True,) if getattr(attention, "rotate_half", False) else ()
        q, k = (
            torch.cat([t[:, :, :prefix], apply_rot_embed_cat(t[:, :, prefix:], rope, *half)], dim=2).type_as(
                v
            )
            for t in (q, k)
        )
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    dropout = attention.attn_drop.p if attention.training else 0.0
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)
    scores = score(q, k, bias)
    out = out.transpose(1, 2).flatten(2)
    if norm is not None:
        out = norm(out)
    if gate is not None:
        out = out * gate(x).sigmoid()
    return attention.proj_drop(attention.proj(out)), scores
