"""Hugging Face transformers: ViT, DeiT, DINOv2 with and without registers, CLIP's and SigLIP's vision models.

Imported only when such a model is given: transformers is an optional dependency.

A reorganising layer is also an instance of the layer class that it replaces, because transformers finds
layers by class to record hidden states, and because that class implements gradient checkpointing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import transformers
from torch import Tensor, nn
from transformers.models.clip import modeling_clip as clip
from transformers.models.deit import modeling_deit as deit
from transformers.models.dinov2 import modeling_dinov2 as dinov2
from transformers.models.dinov2_with_registers import modeling_dinov2_with_registers as dinov2_with_registers
from transformers.models.siglip import modeling_siglip as siglip
from transformers.models.vit import modeling_vit as vit

from evit_ext.cpu.forward import remember
from evit_ext.patching.attention import Attended, Wants, attend
from evit_ext.patching.block import AdoptedBlock, ReorganizingBlock
from evit_ext.patching.families.family import Blocks, Family
from evit_ext.patching.families.huggingface_attention import (
    CPU_FORWARDS,
    KIND_OF_CLIP,
    KIND_OF_DINOV2,
    KIND_OF_VIT,
    HuggingFaceAttention,
    attention_of,
    check_takes_bias,
)


class FollowingLayer(AdoptedBlock):
    """A transformers layer that does not reduce tokens, but whose attention weighs them by their sizes."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Return the replaced layer's result."""
        return with_bias(self, self.carried(hidden_states).bias, hidden_states, attention_mask, kwargs)


def with_bias(
    layer: Any, bias: Tensor | None, hidden_states: Tensor, mask: Tensor | None, named: dict[str, Any]
) -> Tensor:
    """Return a replaced layer's result; a `bias` takes the mask's place: none comes after a reduction."""
    if bias is not None:
        check_takes_bias(attention_of(layer))
    out: Tensor = layer.as_before(hidden_states, mask if bias is None else bias, **named)
    return out


class ReorganizingLayer(ReorganizingBlock):
    """A transformers layer with token reorganisation; there is a subclass for each layer class."""

    KIND: HuggingFaceAttention

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Return the reorganised tokens; a mask is allowed only if all patches are kept."""
        return self.reorganize(
            hidden_states,
            lambda bias: with_bias(self, bias, hidden_states, attention_mask, kwargs),
            masked=attention_mask is not None,
            positions=kwargs,
        )

    def attention_branch(
        self, x: Tensor, wants: Wants, positions: Any, bias: Tensor | None = None
    ) -> Attended:
        """See :meth:`ReorganizingBlock.attention_branch`."""
        layout = self.KIND.layout
        normed = getattr(self, layout.norm1)(x)
        attended = attend(self.KIND, getattr(self, layout.attention), normed, wants, positions, bias)
        out = attended.out
        for name in layout.after_attention:
            out = getattr(self, name)(out)
        return attended._replace(out=out)

    def mlp_norm(self) -> nn.Module | None:
        """See :meth:`ReorganizingBlock.mlp_norm`."""
        return getattr(self, self.KIND.layout.norm2)

    def mlp_branch(self, x: Tensor, normed: Tensor | None) -> Tensor:
        """See :meth:`ReorganizingBlock.mlp_branch`."""
        mlp: Any = self.mlp
        layout = self.KIND.layout
        out: Tensor = mlp(getattr(self, layout.norm2)(x) if normed is None else normed)
        for name in layout.after_mlp:
            out = getattr(self, name)(out)
        return out


class ReorganizingViTLayer(ReorganizingLayer, vit.ViTLayer):
    """transformers' ``ViTLayer`` with token reorganisation."""

    REPLACES = vit.ViTLayer
    KIND = KIND_OF_VIT


class ReorganizingDeiTLayer(ReorganizingLayer, deit.DeiTLayer):
    """transformers' ``DeiTLayer`` with token reorganisation."""

    REPLACES = deit.DeiTLayer
    KIND = KIND_OF_VIT


class ReorganizingDinov2Layer(ReorganizingLayer, dinov2.Dinov2Layer):
    """transformers' ``Dinov2Layer`` with token reorganisation."""

    REPLACES = dinov2.Dinov2Layer
    KIND = KIND_OF_DINOV2


class ReorganizingDinov2WithRegistersLayer(ReorganizingLayer, dinov2_with_registers.Dinov2WithRegistersLayer):
    """transformers' ``Dinov2WithRegistersLayer`` with token reorganisation."""

    REPLACES = dinov2_with_registers.Dinov2WithRegistersLayer
    KIND = KIND_OF_DINOV2


class ReorganizingCLIPEncoderLayer(ReorganizingLayer, clip.CLIPEncoderLayer):
    """transformers' ``CLIPEncoderLayer`` with token reorganisation."""

    REPLACES = clip.CLIPEncoderLayer
    KIND = KIND_OF_CLIP


class ReorganizingSiglipEncoderLayer(ReorganizingLayer, siglip.SiglipEncoderLayer):
    """transformers' ``SiglipEncoderLayer`` with token reorganisation."""

    REPLACES = siglip.SiglipEncoderLayer
    KIND = KIND_OF_CLIP


class FollowingViTLayer(FollowingLayer, vit.ViTLayer):
    """transformers' ``ViTLayer`` whose attention weighs tokens by their sizes."""

    REPLACES = vit.ViTLayer


class FollowingDeiTLayer(FollowingLayer, deit.DeiTLayer):
    """transformers' ``DeiTLayer`` whose attention weighs tokens by their sizes."""

    REPLACES = deit.DeiTLayer


class FollowingDinov2Layer(FollowingLayer, dinov2.Dinov2Layer):
    """transformers' ``Dinov2Layer`` whose attention weighs tokens by their sizes."""

    REPLACES = dinov2.Dinov2Layer


class FollowingDinov2WithRegistersLayer(FollowingLayer, dinov2_with_registers.Dinov2WithRegistersLayer):
    """transformers' ``Dinov2WithRegistersLayer`` whose attention weighs tokens by their sizes."""

    REPLACES = dinov2_with_registers.Dinov2WithRegistersLayer


class FollowingCLIPEncoderLayer(FollowingLayer, clip.CLIPEncoderLayer):
    """transformers' ``CLIPEncoderLayer`` whose attention weighs tokens by their sizes."""

    REPLACES = clip.CLIPEncoderLayer


class FollowingSiglipEncoderLayer(FollowingLayer, siglip.SiglipEncoderLayer):
    """transformers' ``SiglipEncoderLayer`` whose attention weighs tokens by their sizes."""

    REPLACES = siglip.SiglipEncoderLayer


@dataclass(frozen=True)
class Tower:
    """Where a transformers model keeps its vision layers.

    Attributes:
        base: the class that all models of the architecture derive from.
        model: the class, or classes, of the module that holds the layers.
        layers: returns the layers of that module.
        layer, attention: the classes of a layer and its attention.
        reorganizing: the class that replaces a layer.
        following: the class that replaces a layer which hands on sizes of tokens.
        num_prefix_tokens: returns the number of tokens before the patches.
        class_token: whether the first token is a class token.
    """

    base: type[nn.Module]
    model: type[nn.Module] | tuple[type[nn.Module], ...]
    layers: Callable[[Any], Blocks]
    layer: type[nn.Module]
    attention: type[nn.Module]
    reorganizing: type[ReorganizingLayer]
    following: type[FollowingLayer]
    num_prefix_tokens: Callable[[Any], int] = lambda model: 1
    class_token: bool = True

    @property
    def name(self) -> str:
        """The name of the class that holds the layers."""
        return (self.model[0] if isinstance(self.model, tuple) else self.model).__name__


TOWERS = (
    Tower(
        vit.ViTPreTrainedModel,
        vit.ViTModel,
        lambda model: model.layers,
        vit.ViTLayer,
        vit.ViTAttention,
        ReorganizingViTLayer,
        FollowingViTLayer,
    ),
    Tower(
        deit.DeiTPreTrainedModel,
        deit.DeiTModel,
        lambda model: model.layers,
        deit.DeiTLayer,
        deit.DeiTAttention,
        ReorganizingDeiTLayer,
        FollowingDeiTLayer,
        lambda model: 2,  # the distillation token
    ),
    Tower(
        dinov2.Dinov2PreTrainedModel,
        (dinov2.Dinov2Model, dinov2.Dinov2Backbone),
        lambda model: model.encoder.layer,
        dinov2.Dinov2Layer,
        dinov2.Dinov2Attention,
        ReorganizingDinov2Layer,
        FollowingDinov2Layer,
    ),
    Tower(
        dinov2_with_registers.Dinov2WithRegistersPreTrainedModel,
        (
            dinov2_with_registers.Dinov2WithRegistersModel,
            dinov2_with_registers.Dinov2WithRegistersBackbone,
        ),
        lambda model: model.encoder.layer,
        dinov2_with_registers.Dinov2WithRegistersLayer,
        dinov2_with_registers.Dinov2WithRegistersAttention,
        ReorganizingDinov2WithRegistersLayer,
        FollowingDinov2WithRegistersLayer,
        lambda model: 1 + int(model.config.num_register_tokens),
    ),
    Tower(
        clip.CLIPPreTrainedModel,
        clip.CLIPVisionModel,
        lambda model: model.encoder.layers,
        clip.CLIPEncoderLayer,
        clip.CLIPAttention,
        ReorganizingCLIPEncoderLayer,
        FollowingCLIPEncoderLayer,
    ),
    Tower(
        siglip.SiglipPreTrainedModel,
        siglip.SiglipVisionModel,
        lambda model: model.encoder.layers,
        siglip.SiglipEncoderLayer,
        siglip.SiglipAttention,
        ReorganizingSiglipEncoderLayer,
        FollowingSiglipEncoderLayer,
        lambda model: 0,
        class_token=False,
    ),
)


def _holder(tower: Tower, model: nn.Module) -> nn.Module | None:
    """Return the module in `model` that holds the layers of `tower`."""
    return next((module for module in model.modules() if isinstance(module, tower.model)), None)


def _patch_grid(vit: Any, img_size: tuple[int, int]) -> tuple[int, int]:
    side = vit.config.patch_size
    return img_size[0] // side, img_size[1] // side


def _family(tower: Tower) -> Family:
    return Family(
        name=f"transformers' {tower.name}",
        model=tower.base,
        blocks={tower.layer: tower.reorganizing},
        following={tower.layer: tower.following},
        attentions=(tower.attention,),
        attention=tower.reorganizing.KIND.layout.attention,
        vision_tower=lambda model: _holder(tower, model),
        find_blocks=tower.layers,
        num_prefix_tokens=tower.num_prefix_tokens,
        has_class_token=lambda vit: tower.class_token,
        patch_grid=_patch_grid,
        cpu_forwards=CPU_FORWARDS,
    )


FAMILIES = tuple(_family(tower) for tower in TOWERS)


def find(model: nn.Module) -> Family | None:
    """Return the family of a model of transformers, or None if it has no vision model that is known."""
    of_class = (family for family in FAMILIES if family.model is not None and isinstance(model, family.model))
    return next((family for family in of_class if family.vision_tower(model) is not None), None)


def family_of(model: nn.Module) -> Family:
    """Return the family of a model of transformers; a ValueError explains why it is not supported."""
    name = type(model).__name__
    family = find(model)
    if name.endswith("ForMaskedImageModeling") or (family is None and name.endswith("Backbone")):
        raise ValueError(f"{name} is not supported: it needs a token for every patch at the end")
    if family is None:
        known = ", ".join(tower.name for tower in TOWERS)
        raise ValueError(
            f"{name} is not supported: of transformers, evit_ext knows {known}, and what is built on them in "
            f"the same module (transformers {transformers.__version__}){_hint(model)}"
        )
    return family


def _hint(model: Any) -> str:
    """Return what one may use instead of `model`, as the end of a message."""
    inner = getattr(model, "model", model)
    tower = getattr(inner, "vision_tower", None)
    if isinstance(tower, nn.Module):
        path = ".vision_tower" if inner is model else ".model.vision_tower"
        return (
            f"; its vision model is {path}, whose language model expects a token for every patch: "
            "evit_ext.towers.apply changes both"
        )
    in_timm = _IN_TIMM.get(type(model).__name__.partition("For")[0].removesuffix("Model"))
    return "" if in_timm is None else f"; timm's {in_timm} is supported"


#: Architectures that are supported in timm's form.
_IN_TIMM = {"DINOv3ViT": "DINOv3 (vit_small_patch16_dinov3)", "Beit": "BEiT (beit_base_patch16_224)"}

remember(*(tower.layer for tower in TOWERS))
