"""timm's attentions (``Attention``, ``AttentionRope``, ``EvaAttention``, BEiT's ``Attention``) and ``Mlp``.

Notation: B batch, H heads, N tokens, P prefix tokens, C channels, D channels per head.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import apply_rot_embed_cat
from timm.models.beit import Attention as BeitAttention
from timm.models.eva import EvaAttention
from timm.models.vision_transformer import Attention
from torch import Tensor, nn

from evit_ext import ops
from evit_ext.cpu import forward as cpu_forward
from evit_ext.patching.attention import (
    NOTHING_ELSE,
    AttentionKind,
    Linear,
    Projected,
    attend,
    choose,
    is_key_bias,
)

_CLASSES: tuple[type[nn.Module], ...] = (Attention, EvaAttention, BeitAttention)
try:
    from timm.layers import AttentionRope
except ImportError:  # an older timm
    pass
else:
    _CLASSES += (AttentionRope,)


class TimmAttention(AttentionKind):
    """timm's attentions, with or without norms of queries and keys, output norm, gate and grouped queries.

    Positions are timm's rotary embeddings of the patch tokens, [N − P, 2 D], or with leading dimensions that
    broadcast with [B, H]; or None.
    """

    def classes(self) -> tuple[type[nn.Module], ...]:
        """See :meth:`AttentionKind.classes`."""
        return _CLASSES

    def project(self, attention: Any, x: Tensor, linear: Linear, positions: Any) -> Projected:
        """See :meth:`AttentionKind.project`."""
        qkv, q, k, v = _project(attention, x, linear)
        # Not every attention, and not every version of timm, has these.
        q_norm, k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
        norms = [norm for norm in (q_norm, k_norm) if norm is not None]
        if len(norms) == 2 and not all(cpu_forward.is_identity(norm) for norm in norms):
            q, k, qkv = linear(q_norm, q, None), linear(k_norm, k, None), None
        if positions is not None:
            prefix = attention.num_prefix_tokens
            # Older versions of timm do not have this argument.
            half = (True,) if getattr(attention, "rotate_half", False) else ()
            q, k = (
                torch.cat(
                    [t[:, :, :prefix], apply_rot_embed_cat(t[:, :, prefix:], positions, *half)], dim=2
                ).type_as(v)
                for t in (q, k)
            )
            qkv = None
        groups = q.shape[1] // k.shape[1]
        if groups > 1:
            k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        return Projected(q, k, v, qkv)

    def projections(self, attention: Any) -> list[nn.Module]:
        """See :meth:`AttentionKind.projections`."""
        names = ("qkv", "q_proj", "k_proj", "v_proj", "q_norm", "k_norm")
        layers = (getattr(attention, name, None) for name in names)
        return [layer for layer in layers if isinstance(layer, nn.Module)]

    def output(self, attention: Any, x: Tensor, attended: Tensor, linear: Linear) -> Tensor:
        """See :meth:`AttentionKind.output`."""
        norm, gate = getattr(attention, "norm", None), getattr(attention, "gate", None)
        if norm is not None:
            attended = norm(attended)
        if gate is not None:
            attended = attended * gate(x).sigmoid()
        out: Tensor = attention.proj_drop(linear(attention.proj, attended, None))
        return out

    def call(self, attention: Any, x: Tensor, positions: Any, bias: Tensor | None) -> Tensor:
        """See :meth:`AttentionKind.call`."""
        named = {} if positions is None else {"rope": positions}
        # Not every version of timm, and not every attention, has a mask.
        out: Tensor = attention(x, **named) if bias is None else attention(x, attn_mask=bias, **named)
        return out

    def dropout(self, attention: Any) -> float:
        """See :meth:`AttentionKind.dropout`."""
        return float(attention.attn_drop.p) if attention.training else 0.0

    def scale(self, attention: Any) -> float | None:
        """See :meth:`AttentionKind.scale`."""
        # With fused_attn, timm does not pass its `scale` on.
        return None if attention.fused_attn else attention.scale

    def is_sdpa(self, attention: Any) -> bool:
        """See :meth:`AttentionKind.is_sdpa`."""
        return bool(attention.fused_attn)


def _project(attention: Any, x: Tensor, linear: Linear) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    """Return the packed projection [B, N, 3 * H * D], or None if it has separate ones, and q, k, v.

    These are [B, H, N, D] each; keys and values may have fewer heads.
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


TIMM_ATTENTION = TimmAttention()


def attention_forward(attention: Any, x: Tensor, *arguments: Any, **named: Any) -> Tensor:
    """Return a timm attention's output of `x` [B, N, C], on the CPU by our kernel where that is right.

    Other arguments are those of timm's attention.
    """
    rope = named.get("rope")
    mask = named.get("attn_mask")
    bias = mask if is_key_bias(mask) else None
    # No mask but a bias for each key, and no bias of its own; is_causal may be passed as False.
    plain = not arguments and all(
        value is None or value is False or value is bias for name, value in named.items() if name != "rope"
    )
    biased = getattr(attention, "relative_position_bias_table", None) is not None
    if plain and not biased and choose(TIMM_ATTENTION, attention, x, bias, in_forward=True) == "kernel":
        return attend(TIMM_ATTENTION, attention, x, NOTHING_ELSE, rope, bias, backend="kernel").out
    out: Tensor = type(attention).forward(attention, x, *arguments, **named)
    return out


def mlp_forward(module: Any, x: Tensor) -> Tensor:
    """Return the output of timm's ``Mlp`` of `x` [B, N, C], on the CPU by oneDNN where that is right."""
    out = cpu_forward.mlp(module, x) if cpu_forward.may_replace(module, x) else None
    if out is None:
        out = type(module).forward(module, x)
    return out
