"""Hugging Face transformers: ViT, DeiT, DINOv2 with and without registers, CLIP's and SigLIP's vision models.

Imported only when such a model is given, as transformers is not needed for anything else.

A reorganising layer is also an instance of the layer class that it replaces: transformers finds layers by
their class to record hidden states, and that class brings gradient checkpointing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers.models.clip import modeling_clip as clip
from transformers.models.deit import modeling_deit as deit
from transformers.models.dinov2 import modeling_dinov2 as dinov2
from transformers.models.dinov2_with_registers import modeling_dinov2_with_registers as dinov2_with_registers
from transformers.models.siglip import modeling_siglip as siglip
from transformers.models.vit import modeling_vit as vit

from evit_ext.attention import Score
from evit_ext.block import ReorganizingBlock
from evit_ext.families.family import Blocks, Family


@dataclass(frozen=True)
class Layout:
    """The names that a layer class has for its parts.

    Attributes:
        norm1, attention, norm2: submodules; the MLP is ``mlp`` everywhere.
        after_attention, after_mlp: submodules that what these return goes through, in order.
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


class ReorganizingLayer(ReorganizingBlock):
    """A layer of transformers with token reorganisation; subclasses say of which class."""

    LAYOUT: Layout

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Return the reorganised tokens; a mask only where all patches are kept."""
        return self.reorganize(
            hidden_states,
            lambda: self.as_before(hidden_states, attention_mask, **kwargs),
            masked=attention_mask is not None,
        )

    def attention_branch(self, x: Tensor, score: Score, positions: Any) -> tuple[Tensor, Tensor]:
        """See :meth:`ReorganizingBlock.attention_branch`."""
        layout = self.LAYOUT
        attention: Any = getattr(self, layout.attention)
        normed = getattr(self, layout.norm1)(x)
        q, k, v = (
            projection(normed).unflatten(2, (-1, attention.head_dim)).transpose(1, 2)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        dropout = getattr(attention, layout.dropout) if attention.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
        out = getattr(attention, layout.out)(out.transpose(1, 2).flatten(2))
        for name in layout.after_attention:
            out = getattr(self, name)(out)
        return out, score(q, k, None)

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
    """Where in a model of transformers the layers are.

    Attributes:
        base: the class that all models of the architecture derive from.
        model: the class of the module that holds the layers.
        layers: returns them.
        layer, attention: their classes.
        reorganizing: what takes the place of a layer.
        num_prefix_tokens: returns the number of tokens before the patches.
        class_token: whether the first of them is a class token.
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
    """Return the layers of the vision model in `model`; None where there is none that is known."""
    found = _find_tower(model)
    return None if found is None else found[0].layers(found[1])


def vision_tower(model: nn.Module) -> nn.Module:
    """Return the vision model in `model`; `model` itself where there is none that is known."""
    found = _find_tower(model)
    return model if found is None else found[1]


def family_of(model: nn.Module) -> Family:
    """Return the family of a model of transformers; ValueError that says why if it cannot be supported."""
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
