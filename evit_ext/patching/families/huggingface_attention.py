"""The attentions and MLPs of transformers' vision models, and their faster forwards for the CPU."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN, GELUActivation
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.clip import modeling_clip as clip
from transformers.models.deit import modeling_deit as deit
from transformers.models.dinov2 import modeling_dinov2 as dinov2
from transformers.models.dinov2_with_registers import modeling_dinov2_with_registers as dinov2_with_registers
from transformers.models.siglip import modeling_siglip as siglip
from transformers.models.vit import modeling_vit as vit
from transformers.utils import output_capturing

from evit_ext._util.wrappers import unwrapped
from evit_ext.cpu import forward as cpu_forward
from evit_ext.cpu.replacing import Forward
from evit_ext.patching.attention import (
    NOTHING_ELSE,
    AttentionKind,
    Linear,
    Projected,
    attend,
    choose,
    is_key_bias,
)


@dataclass(frozen=True)
class Layout:
    """The names of a layer class's parts.

    Attributes:
        norm1, attention, norm2: submodules; the MLP is always ``mlp``.
        after_attention, after_mlp: submodules applied to the output of attention and MLP, in order.
        out: the attention's projection of its output.
        dropout: the attention's dropout probability.
    """

    norm1: str
    attention: str
    norm2: str
    after_attention: tuple[str, ...] = ()
    after_mlp: tuple[str, ...] = ()
    out: str = "o_proj"
    dropout: str = "attention_dropout"


_VIT = Layout("layernorm_before", "attention", "layernorm_after", ("dropout",), ("dropout",))
_DINOV2 = Layout("norm1", "attention", "norm2", ("layer_scale1", "drop_path"), ("layer_scale2", "drop_path"))
_CLIP = Layout("layer_norm1", "self_attn", "layer_norm2", out="out_proj", dropout="dropout")


class HuggingFaceAttention(AttentionKind):
    """The attentions of transformers that are supported. Positions are further arguments of their forward."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout

    def classes(self) -> tuple[type[nn.Module], ...]:
        """See :meth:`AttentionKind.classes`."""
        return tuple(_KINDS)

    def project(self, attention: Any, x: Tensor, linear: Linear, positions: Any) -> Projected:
        """See :meth:`AttentionKind.project`."""
        q, k, v = (
            linear(layer, x, None).unflatten(2, (-1, attention.head_dim)).transpose(1, 2)
            for layer in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        return Projected(q, k, v, None)

    def projections(self, attention: Any) -> list[nn.Module]:
        """See :meth:`AttentionKind.projections`."""
        return [attention.q_proj, attention.k_proj, attention.v_proj]

    def output(self, attention: Any, x: Tensor, attended: Tensor, linear: Linear) -> Tensor:
        """See :meth:`AttentionKind.output`."""
        return linear(getattr(attention, self.layout.out), attended, None)

    def call(self, attention: Any, x: Tensor, positions: Any, bias: Tensor | None) -> Tensor:
        """See :meth:`AttentionKind.call`."""
        if bias is not None:
            check_takes_bias(attention)
        out: Tensor = attention(hidden_states=x, attention_mask=bias, **(positions or {}))[0]
        return out

    def dropout(self, attention: Any) -> float:
        """See :meth:`AttentionKind.dropout`."""
        return float(getattr(attention, self.layout.dropout)) if attention.training else 0.0

    def scale(self, attention: Any) -> float | None:
        """See :meth:`AttentionKind.scale`; users can change it."""
        return getattr(attention, "scaling", getattr(attention, "scale", None))

    def is_sdpa(self, attention: Any) -> bool:
        """See :meth:`AttentionKind.is_sdpa`; users choose another function for its map or its exact bits."""
        if attention.config._attn_implementation != "sdpa":
            return False
        # Attributes that this function reads, and the attentions here have as they are in encoders.
        plain = not getattr(attention, "is_causal", False) and not hasattr(attention, "num_key_value_groups")
        return plain and ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward

    def is_watched(self, attention: Any) -> bool:
        """See :meth:`AttentionKind.is_watched`; the hooks that transformers leaves behind do nothing."""
        hooks = attention._forward_hooks.values()
        if torch.compiler.is_compiling() or not all(hook.__module__ == _CAPTURING for hook in hooks):
            return super().is_watched(attention)
        others = (*attention._forward_pre_hooks, *attention._backward_hooks, *attention._backward_pre_hooks)
        collected = output_capturing._active_collector.get() if hooks else None
        # Hidden states are those of layers. Nor is the collector there when a checkpointed layer runs again.
        collecting = collected is not None and not _OF_LAYERS.issuperset(collected)
        return collecting or bool(others) or torch.nn.modules.module._has_any_global_hook()


def attention_of(layer: nn.Module) -> nn.Module:
    """Return the attention of a layer."""
    return next(part for part in layer.children() if isinstance(unwrapped(part), tuple(_KINDS)))


def check_takes_bias(attention: Any) -> None:
    """Raise RuntimeError where the function that an attention would call adds no bias for each key."""
    chosen = attention.config._attn_implementation
    if chosen not in ("sdpa", "eager"):
        raise RuntimeError(
            f"the attention {chosen!r} of transformers takes no bias for each key, by which it would weigh "
            "tokens that were merged: use attn_implementation='sdpa', or a rule with proportional=False"
        )


#: Where the hooks come from that record hidden states and attention maps.
_CAPTURING = output_capturing.__name__

#: What hooks on layers, not on attentions, collect.
_OF_LAYERS = frozenset({"hidden_states", "_hidden_states_layers"})

#: Arguments that transformers passes to attentions but that do not change what they compute.
_RECORDING = frozenset({"output_hidden_states", "output_attentions", "return_dict"})


def attention_forward(
    attention: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, **named: Any
) -> tuple[Tensor, Tensor | None]:
    """Return an attention's output and its map; only "eager" attention returns a map."""
    kind, x = _KINDS[type(attention)], hidden_states
    asked = [value for name, value in named.items() if name not in _RECORDING]
    bias = attention_mask if is_key_bias(attention_mask) else None
    plain = attention_mask is bias and all(value is None or value is False for value in asked)
    if plain and choose(kind, attention, x, bias, in_forward=True) == "kernel":
        return attend(kind, attention, x, NOTHING_ELSE, bias=bias, backend="kernel").out, None
    out: tuple[Tensor, Tensor | None] = type(attention).forward(
        attention, hidden_states, attention_mask=attention_mask, **named
    )
    return out


def mlp_forward(mlp: Any, hidden_states: Tensor) -> Tensor:
    """Return the output of an MLP of two linear layers, on the CPU by oneDNN where that is right."""
    out: Tensor | None = None
    approximate = _gelu(mlp.activation_fn)
    if approximate is not None and cpu_forward.may_replace(mlp, hidden_states):
        out = cpu_forward.gelu_between(mlp.fc1, approximate, mlp.fc2, hidden_states)
    if out is None:
        out = type(mlp).forward(mlp, hidden_states)
    return out


def _gelu(activation: Any) -> str | None:
    """Return the `approximate` argument of a GELU; None for other activations and those with hooks."""
    if cpu_forward.as_written(activation, nn.GELU):
        return str(activation.approximate)
    if not any(cpu_forward.as_written(activation, kind) for kind in _GELUS):
        return None
    # The function that these modules call; it can also be a formula in Python.
    function = activation.act
    if function is F.gelu:
        return "none"
    is_tanh = isinstance(function, functools.partial) and function.keywords == {"approximate": "tanh"}
    return "tanh" if is_tanh and function.func is F.gelu and not function.args else None


#: Transformers' own modules for GELU and its approximation by tanh.
_GELUS = (GELUActivation, type(ACT2FN["gelu_pytorch_tanh"]))


KIND_OF_VIT = HuggingFaceAttention(_VIT)
KIND_OF_DINOV2 = HuggingFaceAttention(_DINOV2)
KIND_OF_CLIP = HuggingFaceAttention(_CLIP)

_KINDS: dict[type[nn.Module], HuggingFaceAttention] = {
    vit.ViTAttention: KIND_OF_VIT,
    deit.DeiTAttention: KIND_OF_VIT,
    dinov2.Dinov2Attention: KIND_OF_DINOV2,
    dinov2_with_registers.Dinov2WithRegistersAttention: KIND_OF_DINOV2,
    clip.CLIPAttention: KIND_OF_CLIP,
    siglip.SiglipAttention: KIND_OF_CLIP,
}

_MLPS: tuple[type[nn.Module], ...] = (
    vit.ViTMLP,
    deit.DeiTMLP,
    dinov2.Dinov2MLP,
    dinov2_with_registers.Dinov2WithRegistersMLP,
    clip.CLIPMLP,
    siglip.SiglipMLP,
)

CPU_FORWARDS: dict[type[nn.Module], Forward] = {
    **dict.fromkeys(_KINDS, attention_forward),
    **dict.fromkeys(_MLPS, mlp_forward),
}
cpu_forward.remember(*CPU_FORWARDS, *_GELUS)
