"""Hugging Face transformers: ViT, DeiT, DINOv2 with and without registers, CLIP's and SigLIP's vision models.

Imported only when such a model is given: transformers is an optional dependency.

A reorganising layer is also an instance of the layer class that it replaces, because transformers finds
layers by class to record hidden states, and because that class implements gradient checkpointing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers.activations import ACT2FN, GELUActivation
from transformers.models.clip import modeling_clip as clip
from transformers.models.deit import modeling_deit as deit
from transformers.models.dinov2 import modeling_dinov2 as dinov2
from transformers.models.dinov2_with_registers import modeling_dinov2_with_registers as dinov2_with_registers
from transformers.models.siglip import modeling_siglip as siglip
from transformers.models.vit import modeling_vit as vit

from evit_ext.cpu import forward as cpu_forward
from evit_ext.cpu.forward import CpuForward
from evit_ext.patching.attention import Score, apply_linear, class_token_score, packed_attention
from evit_ext.patching.block import ReorganizingBlock
from evit_ext.patching.families.family import Blocks, Family


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


def attend(attention: Any, layout: Layout, x: Tensor, score: Score) -> tuple[Tensor, Tensor]:
    """Run one of transformers' attentions on `x` [B, N, C], like :func:`evit_ext.patching.attention.attend`.

    Returns:
        The attention's output [B, N, C] and the scores [B, N].
    """
    dropout = getattr(attention, layout.dropout) if attention.training else 0.0
    on_cpu = dropout == 0 and _may_attend(attention, x)
    linear = cpu_forward.linear if on_cpu else apply_linear
    q, k, v = (
        linear(projection, x, None).unflatten(2, (-1, attention.head_dim)).transpose(1, 2)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    if on_cpu and cpu_forward.attends(q, k, v):
        out, scores = packed_attention(cpu_forward.pack(q, k, v), q.shape[1], score)
    else:
        scaling, usual = _scaling(attention), attention.head_dim**-0.5
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scaling)
        out = out.transpose(1, 2).flatten(2)
        # `score` applies the default scale; q corrects for any other.
        scores = score(q if scaling == usual else q * (scaling / usual), k, None)
    return linear(getattr(attention, layout.out), out, None), scores


def _may_attend(attention: Any, x: Tensor) -> bool:
    """Return whether an unmasked attention may use our kernel, which applies the default scale."""
    usual = _scaling(attention) == attention.head_dim**-0.5
    return usual and cpu_forward.may_replace(attention, x, with_gradient=True) and cpu_forward.attends(x)


def _scaling(attention: Any) -> float:
    """Return the factor of an attention's dot products, which users can change."""
    usual = attention.head_dim**-0.5
    return float(getattr(attention, "scaling", getattr(attention, "scale", usual)))


class CpuAttention(CpuForward):
    """Overrides the ``forward`` of an attention; subclasses set its layout."""

    LAYOUT: Layout

    def __call__(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **named: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Return the attention's output and its map; only "eager" attention returns a map."""
        attention: Any = self.module
        # Only the default implementation is replaced: users choose another one for its map or its exact bits.
        plain = attention_mask is None and attention.config._attn_implementation == "sdpa"
        asked = [value for name, value in named.items() if name not in _RECORDING]
        plain = plain and all(value is None or value is False for value in asked)
        dropout = attention.training and getattr(attention, self.LAYOUT.dropout) > 0
        x = hidden_states
        if plain and not dropout and _may_attend(attention, x):
            return attend(attention, self.LAYOUT, x, class_token_score)[0], None
        out: tuple[Tensor, Tensor | None] = self.original()(hidden_states, attention_mask, **named)
        return out


#: Arguments that transformers passes to attentions but that do not change what they compute.
_RECORDING = frozenset({"output_hidden_states", "return_dict"})


class CpuViTAttention(CpuAttention):
    """Overrides the forward of ``ViTAttention`` and ``DeiTAttention``."""

    LAYOUT = _VIT


class CpuDinov2Attention(CpuAttention):
    """Overrides the forward of DINOv2's attentions."""

    LAYOUT = _DINOV2


class CpuCLIPAttention(CpuAttention):
    """Overrides the forward of ``CLIPAttention`` and ``SiglipAttention``."""

    LAYOUT = _CLIP


class CpuMlp(CpuForward):
    """Overrides the ``forward`` of an MLP of two linear layers."""

    def __call__(self, hidden_states: Tensor) -> Tensor:
        """Return the MLP of `hidden_states` [B, N, C]."""
        mlp: Any = self.module
        out: Tensor | None = None
        approximate = _gelu(mlp.activation_fn)
        if approximate is not None and cpu_forward.may_replace(mlp, hidden_states):
            out = cpu_forward.gelu_between(mlp.fc1, approximate, mlp.fc2, hidden_states)
        return self.original()(hidden_states) if out is None else out


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


CPU_FORWARDS: dict[type[nn.Module], type[CpuForward]] = {
    vit.ViTAttention: CpuViTAttention,
    vit.ViTMLP: CpuMlp,
    deit.DeiTAttention: CpuViTAttention,
    deit.DeiTMLP: CpuMlp,
    dinov2.Dinov2Attention: CpuDinov2Attention,
    dinov2.Dinov2MLP: CpuMlp,
    dinov2_with_registers.Dinov2WithRegistersAttention: CpuDinov2Attention,
    dinov2_with_registers.Dinov2WithRegistersMLP: CpuMlp,
    clip.CLIPAttention: CpuCLIPAttention,
    clip.CLIPMLP: CpuMlp,
    siglip.SiglipAttention: CpuCLIPAttention,
    siglip.SiglipMLP: CpuMlp,
}
cpu_forward.remember(*CPU_FORWARDS, *_GELUS)


class ReorganizingLayer(ReorganizingBlock):
    """A transformers layer with token reorganisation; there is a subclass for each layer class."""

    LAYOUT: Layout

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Return the reorganised tokens; a mask is allowed only if all patches are kept."""
        return self.reorganize(
            hidden_states,
            lambda: self.as_before(hidden_states, attention_mask, **kwargs),
            masked=attention_mask is not None,
        )

    def attention_branch(self, x: Tensor, score: Score, positions: Any) -> tuple[Tensor, Tensor]:
        """See :meth:`ReorganizingBlock.attention_branch`."""
        layout = self.LAYOUT
        out, scores = attend(getattr(self, layout.attention), layout, getattr(self, layout.norm1)(x), score)
        for name in layout.after_attention:
            out = getattr(self, name)(out)
        return out, scores

    def mlp_norm(self) -> nn.Module | None:
        """See :meth:`ReorganizingBlock.mlp_norm`."""
        return getattr(self, self.LAYOUT.norm2)

    def mlp_branch(self, x: Tensor, normed: Tensor | None) -> Tensor:
        """See :meth:`ReorganizingBlock.mlp_branch`."""
        mlp: Any = self.mlp
        out: Tensor = mlp(getattr(self, self.LAYOUT.norm2)(x) if normed is None else normed)
        for name in self.LAYOUT.after_mlp:
            out = getattr(self, name)(out)
        return out


class ReorganizingViTLayer(ReorganizingLayer, vit.ViTLayer):
    """transformers' ``ViTLayer`` with token reorganisation."""

    LAYOUT = _VIT


class ReorganizingDeiTLayer(ReorganizingLayer, deit.DeiTLayer):
    """transformers' ``DeiTLayer`` with token reorganisation."""

    LAYOUT = _VIT


class ReorganizingDinov2Layer(ReorganizingLayer, dinov2.Dinov2Layer):
    """transformers' ``Dinov2Layer`` with token reorganisation."""

    LAYOUT = _DINOV2


class ReorganizingDinov2WithRegistersLayer(ReorganizingLayer, dinov2_with_registers.Dinov2WithRegistersLayer):
    """transformers' ``Dinov2WithRegistersLayer`` with token reorganisation."""

    LAYOUT = _DINOV2


class ReorganizingCLIPEncoderLayer(ReorganizingLayer, clip.CLIPEncoderLayer):
    """transformers' ``CLIPEncoderLayer`` with token reorganisation."""

    LAYOUT = _CLIP


class ReorganizingSiglipEncoderLayer(ReorganizingLayer, siglip.SiglipEncoderLayer):
    """transformers' ``SiglipEncoderLayer`` with token reorganisation."""

    LAYOUT = _CLIP


@dataclass(frozen=True)
class Tower:
    """Where a transformers model keeps its vision layers.

    Attributes:
        base: the class that all models of the architecture derive from.
        model: the class of the module that holds the layers.
        layers: returns the layers of that module.
        layer, attention: the classes of a layer and its attention.
        reorganizing: the class that replaces a layer.
        num_prefix_tokens: returns the number of tokens before the patches.
        class_token: whether the first token is a class token.
    """

    base: type[nn.Module]
    model: type[nn.Module]
    layers: Callable[[Any], Blocks]
    layer: type[nn.Module]
    attention: type[nn.Module]
    reorganizing: type[ReorganizingLayer]
    num_prefix_tokens: Callable[[Any], int] = lambda model: 1
    class_token: bool = True


_TOWERS = (
    Tower(
        vit.ViTPreTrainedModel,
        vit.ViTModel,
        lambda model: model.layers,
        vit.ViTLayer,
        vit.ViTAttention,
        ReorganizingViTLayer,
    ),
    Tower(
        deit.DeiTPreTrainedModel,
        deit.DeiTModel,
        lambda model: model.layers,
        deit.DeiTLayer,
        deit.DeiTAttention,
        ReorganizingDeiTLayer,
        lambda model: 2,  # the distillation token
    ),
    Tower(
        dinov2.Dinov2PreTrainedModel,
        dinov2.Dinov2Model,
        lambda model: model.encoder.layer,
        dinov2.Dinov2Layer,
        dinov2.Dinov2Attention,
        ReorganizingDinov2Layer,
    ),
    Tower(
        dinov2_with_registers.Dinov2WithRegistersPreTrainedModel,
        dinov2_with_registers.Dinov2WithRegistersModel,
        lambda model: model.encoder.layer,
        dinov2_with_registers.Dinov2WithRegistersLayer,
        dinov2_with_registers.Dinov2WithRegistersAttention,
        ReorganizingDinov2WithRegistersLayer,
        lambda model: 1 + int(model.config.num_register_tokens),
    ),
    Tower(
        clip.CLIPPreTrainedModel,
        clip.CLIPVisionModel,
        lambda model: model.encoder.layers,
        clip.CLIPEncoderLayer,
        clip.CLIPAttention,
        ReorganizingCLIPEncoderLayer,
    ),
    Tower(
        siglip.SiglipPreTrainedModel,
        siglip.SiglipVisionModel,
        lambda model: model.encoder.layers,
        siglip.SiglipEncoderLayer,
        siglip.SiglipAttention,
        ReorganizingSiglipEncoderLayer,
        lambda model: 0,
        class_token=False,
    ),
)


def _find_tower(model: nn.Module) -> tuple[Tower, nn.Module] | None:
    """Return the tower in `model` and the module that holds its layers."""
    for tower in _TOWERS:
        if isinstance(model, tower.base):
            for module in model.modules():
                if isinstance(module, tower.model):
                    return tower, module
    return None


def find_blocks(model: nn.Module) -> Blocks | None:
    """Return the layers of the vision model in `model`, or None if it has no supported one."""
    found = _find_tower(model)
    return None if found is None else found[0].layers(found[1])


def vision_tower(model: nn.Module) -> nn.Module:
    """Return the vision model in `model`, or `model` itself if it has no supported one."""
    found = _find_tower(model)
    return model if found is None else found[1]


def family_of(model: nn.Module) -> Family:
    """Return the family of a transformers model; a ValueError explains why it is not supported."""
    name = type(model).__name__
    if name.endswith(("ForMaskedImageModeling", "Backbone")):
        raise ValueError(f"{name} is not supported: it needs a token for every patch at the end")
    found = _find_tower(model)
    if found is None:
        known = ", ".join(tower.model.__name__ for tower in _TOWERS)
        raise ValueError(
            f"{name} is not supported: of transformers, evit_ext knows {known}, and what is built on them in "
            f"the same module (transformers {transformers.__version__})"
        )
    tower, holder = found
    return Family(
        name=f"transformers' {tower.model.__name__}",
        model=tower.base,
        blocks={tower.layer: tower.reorganizing},
        attentions=(tower.attention,),
        attention=tower.reorganizing.LAYOUT.attention,
        find_blocks=lambda model: tower.layers(holder),
        num_prefix_tokens=lambda model: tower.num_prefix_tokens(holder),
        has_class_token=lambda model: tower.class_token,
    )
