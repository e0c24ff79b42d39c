"""timm's attentions, run so that they also return how much attention every token receives.

Notation: B batch, H heads, N tokens, P prefix tokens, C channels, D channels per head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import apply_rot_embed_cat
from torch import Tensor

from evit_ext import ops
from evit_ext.cpu import forward as cpu_forward
from evit_ext.ops import checks

#: Applies a linear layer to a tensor; a bias that is not None replaces the layer's own.
Linear = Callable[[Any, Tensor, Tensor | None], Tensor]

#: Computes scores [B, N] from queries and keys [B, H, N, D] and an attention bias or None.
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
    # One row of the biased map. Not worth an operator: it is N products per head, and few models have a bias.
    q, k = checks.autocast(q[:, :, 0], k)
    dtype = checks.accumulation_dtype(k.dtype)
    with checks.without_autocast(k.device.type):
        # Cast before the products, as the operator does: in float16 they could overflow.
        row = (k.to(dtype) @ q.to(dtype).unsqueeze(-1)).squeeze(-1)
        return (row * q.shape[2] ** -0.5 + bias[:, :, 0]).softmax(dim=-1).mean(dim=1)


def mean_score(q: Tensor, k: Tensor, bias: Tensor | None) -> Tensor:
    """Return how much all tokens attend to every token on average, for models without a class token.

    Same arguments and result as :func:`class_token_score`, but a bias is not supported.
    """
    assert bias is None
    return ops.mean_attention(q, k)


def apply_linear(layer: Any, x: Tensor, bias: Tensor | None) -> Tensor:
    """Apply a linear layer to `x`; a bias that is not None replaces the layer's own."""
    out: Tensor = layer(x) if bias is None else F.linear(x, layer.weight, bias)
    return out


def project(attention: Any, x: Tensor, linear: Linear) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    """Project `x` [B, N, C] as timm's attentions do, with `linear` to apply a layer.

    Returns:
        The packed projection [B, N, 3 * H * D], or None if the attention has separate projections; then
        queries, keys and values, each [B, H, N, D]. Keys and values may have fewer heads.
    """
    if attention.qkv is None:
        layers = (attention.q_proj, attention.k_proj, attention.v_proj)
        projections = [linear(layer, x, None) for layer in layers]
        head_dim = projections[0].shape[2] // attention.num_heads
        q, k, v = (y.unflatten(2, (y.shape[2] // head_dim, head_dim)).transpose(1, 2) for y in projections)
        return None, q, k, v
    if getattr(attention, "q_bias", None) is None:
        qkv = linear(attention.qkv, x, None)
    else:
        bias = torch.cat((attention.q_bias, attention.k_bias, attention.v_bias))
        separate = attention.qkv_bias_separate
        qkv = linear(attention.qkv, x, None) + bias if separate else linear(attention.qkv, x, bias)
    # Views, because class_attention reads them in place.
    return qkv, *ops.reference.unpacked(qkv, attention.num_heads)


def attend(
    attention: Any,
    x: Tensor,
    score: Score = class_token_score,
    rope: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run one of timm's attentions on `x` and also return how much attention every token receives.

    The output is that of the attention itself. It comes from scaled_dot_product_attention or, on the CPU,
    from :func:`evit_ext.ops.attention_with_scores` where that computes the same, so no N × N map is formed.
    Hooks on `attention` itself do not run; those on its projections do.

    Args:
        attention: timm's ``Attention``, ``AttentionRope``, ``EvaAttention`` or BEiT's ``Attention``, with or
            without norms of queries and keys, output norm, gate and grouped queries.
        x: normalised tokens [B, N, C], prefix tokens first.
        score: computes the scores: :func:`class_token_score` or :func:`mean_score`.
        rope: timm's rotary embeddings of the patch tokens, [N - P, 2 D], or with leading dimensions that
            broadcast with [B, H].
        bias: added to the scaled products, [B or 1, H, N, N].

    Returns:
        The attention's output [B, N, C] and the scores [B, N], float32 (float64 for float64), which sum to 1.
    """
    dropout = attention.attn_drop.p if attention.training else 0.0
    on_cpu = bias is None and cpu_forward.may_attend(attention, x)
    linear = cpu_forward.linear if on_cpu else apply_linear
    qkv, q, k, v = project(attention, x, linear)
    as_projected = True
    # Not every attention, and not every version of timm, has these.
    q_norm, k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
    if q_norm is not None and k_norm is not None:
        q, k = q_norm(q), k_norm(k)
        as_projected &= cpu_forward.is_identity(q_norm) and cpu_forward.is_identity(k_norm)
    if rope is not None:
        prefix = attention.num_prefix_tokens
        # Older versions of timm do not have this argument.
        half = (True,) if getattr(attention, "rotate_half", False) else ()
        q, k = (
            torch.cat([t[:, :, :prefix], apply_rot_embed_cat(t[:, :, prefix:], rope, *half)], dim=2).type_as(
                v
            )
            for t in (q, k)
        )
        as_projected = False
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    if on_cpu and cpu_forward.attends(q, k, v):
        if qkv is None or not as_projected:
            qkv = cpu_forward.pack(q, k, v)
        out, scores = packed_attention(qkv, attention.num_heads, score)
    else:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)
        out, scores = out.transpose(1, 2).flatten(2), score(q, k, bias)
    return _output(attention, x, out, linear), scores


def packed_attention(qkv: Tensor, num_heads: int, score: Score) -> tuple[Tensor, Tensor]:
    """Return the attention [B, N, H * D] of packed queries, keys and values, and their scores by `score`."""
    out, scores = ops.attention_with_scores(qkv, num_heads)
    if score is class_token_score:
        return out, scores
    q, k, _ = ops.reference.unpacked(qkv, num_heads)
    return out, score(q, k, None)


def _output(attention: Any, x: Tensor, attended: Tensor, linear: Linear) -> Tensor:
    """Return the output of one of timm's attentions, given the outputs of its heads [B, N, H * D]."""
    norm, gate = getattr(attention, "norm", None), getattr(attention, "gate", None)
    if norm is not None:
        attended = norm(attended)
    if gate is not None:
        attended = attended * gate(x).sigmoid()
    out: Tensor = attention.proj_drop(linear(attention.proj, attended, None))
    return out
