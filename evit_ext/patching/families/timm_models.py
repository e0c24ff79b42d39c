"""The families of timm, and why its other models cannot be supported."""

from __future__ import annotations

from torch import nn

from evit_ext.cpu.forward import remember
from evit_ext.patching.block import AdoptedBlock
from evit_ext.patching.families import beit, eva, vision_transformer
from evit_ext.patching.families.family import Family
from evit_ext.tokens.stage import find_stages

FAMILIES = (vision_transformer.FAMILY, eva.FAMILY, beit.FAMILY)

for _family in FAMILIES:
    remember(*_family.attentions, *_family.cpu_forwards, *_family.blocks)

_PARALLEL = "its attention and MLP run side by side, so no tokens can be dropped between them"

#: Why blocks and attentions of timm cannot be supported, by the name of their class.
REASONS = {
    "ParallelScalingBlock": _PARALLEL,
    "DiffParallelScalingBlock": _PARALLEL,
    "ParallelThingsBlock": "it has several attentions, and so no one score for a token",
    "DiffAttention": "its weights are the difference of two softmaxes, which is no score",
    "RelPosBlock": "its relative position embedding is not known to evit_ext",
    "ResPostRelPosBlock": "its relative position embedding is not known to evit_ext",
    "LayerScaleBlock": "CaiT has no class token in it, and mixes the attention of its heads",
    "XCABlock": "its attention is between channels, so that tokens get no score",
}

#: Where other libraries keep the vision transformer of a model, and what one should say instead of the model.
_HINTS = ("module", "base_model.model", "visual", "model.vision_tower", "vision_tower", "model", "trunk")


def find(model: nn.Module) -> Family | None:
    """Return the family of a timm model by what it is; one that is not supported counts as a plain ViT."""
    of_class = (family for family in FAMILIES if family.model is not None and isinstance(model, family.model))
    family = next(of_class, vision_transformer.FAMILY)
    blocks = family.find_blocks(model)
    return family if blocks is not None and len(blocks) > 0 else None


def family_of(vit: nn.Module) -> Family:
    """Return the family of `vit`; a ValueError explains why it belongs to none."""
    name = type(vit).__name__
    blocks = vision_transformer.FAMILY.find_blocks(vit)
    if blocks is None or len(blocks) == 0:
        full = name if name != "VisionTransformer" else f"{type(vit).__module__}.{name}"
        raise ValueError(
            f"{full} is not supported: expected a vision transformer with its blocks in .blocks, as timm's "
            f"VisionTransformer has{_hint(vit)}"
        )
    stages = find_stages(vit)
    if stages and not any(isinstance(stage, AdoptedBlock) for stage in stages):
        raise ValueError(
            f"{name} is not supported: it drops tokens itself, by the rule {stages[0].rule.name}"
        )
    if name == "NaFlexVit":
        raise ValueError("NaFlexVit is not supported: its images are padded and masked sequences of patches")
    replaced = {type(block) for block in blocks if not isinstance(block, AdoptedBlock)}
    for family in FAMILIES:
        if family.model is not None and isinstance(vit, family.model):
            return family
        if replaced & set(family.blocks):
            break
    else:
        family = vision_transformer.FAMILY  # its check of the blocks reports what is expected
    if family.model is not None:
        raise ValueError(f"{name} is not supported: it has the blocks of {family.name}, but is none")
    if not hasattr(vit, "num_prefix_tokens"):
        raise ValueError(
            f"{name} is not supported: it does not tell the number of its prefix tokens (.num_prefix_tokens)"
        )
    return family


def _hint(vit: nn.Module) -> str:
    """Return where the vision transformer inside `vit` is, as the end of a message."""
    for path in _HINTS:
        inner: object = vit
        for attribute in path.split("."):
            inner = getattr(inner, attribute, None)
        if isinstance(inner, nn.Module):
            return f"; pass the model inside the wrapper (.{path})"
    return ""
