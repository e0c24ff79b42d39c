"""The model families that :func:`evit_ext.apply` supports.

Each family is a module of this package. It defines which block classes can be replaced, by what, and how
positions reach the blocks. To support other models, add a module and its family to ``FAMILIES``.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import re
import sys
from collections.abc import Mapping
from typing import Any

from torch import nn

from evit_ext.cpu.forward import CpuForward, remember
from evit_ext.patching.block import ReorganizingBlock
from evit_ext.patching.families import beit, eva, vision_transformer
from evit_ext.patching.families.family import Blocks, Family

__all__ = [
    "FAMILIES",
    "Blocks",
    "Family",
    "applied_blocks",
    "check_block",
    "cpu_forwards",
    "family_of",
    "find_blocks",
    "reorganizing_blocks",
    "vision_tower",
]

FAMILIES = (vision_transformer.FAMILY, eva.FAMILY, beit.FAMILY)

_CPU_FORWARDS = {module: forward for family in FAMILIES for module, forward in family.cpu_forwards.items()}
remember(*_CPU_FORWARDS)

#: The first release of transformers whose vision models have the layers that evit_ext knows.
MINIMUM_TRANSFORMERS = (5, 18)

_PARALLEL = "its attention and MLP run side by side, so no tokens can be dropped between them"

#: Why blocks and attentions of timm cannot be supported, by the name of their class.
_REASONS = {
    "ParallelScalingBlock": _PARALLEL,
    "DiffParallelScalingBlock": _PARALLEL,
    "ParallelThingsBlock": "it has several attentions, and so no one score for a token",
    "DiffAttention": "its weights are the difference of two softmaxes, which is no score",
    "RelPosBlock": "its relative position embedding is not known to evit_ext",
    "ResPostRelPosBlock": "its relative position embedding is not known to evit_ext",
    "LayerScaleBlock": "CaiT has no class token in it, and mixes the attention of its heads",
    "XCABlock": "its attention is between channels, so that tokens get no score",
}


def family_of(vit: nn.Module) -> Family:
    """Return the family of `vit`; a ValueError explains why it belongs to none."""
    if _is_of_transformers(vit):
        return _huggingface().family_of(vit)
    name = type(vit).__name__
    blocks = getattr(vit, "blocks", None)
    if not isinstance(blocks, (nn.Sequential, nn.ModuleList)) or len(blocks) == 0:
        raise ValueError(
            f"{name} is not supported: expected a vision transformer with its blocks in .blocks, as timm's "
            f"VisionTransformer has{_hint_of_wrapper(vit)}"
        )
    if hasattr(vit, "score_predictor"):
        raise ValueError(f"{name} is not supported: it drops tokens itself, by its score_predictor")
    if name == "NaFlexVit":
        raise ValueError("NaFlexVit is not supported: its images are padded and masked sequences of patches")
    replaced = {type(block) for block in blocks if not isinstance(block, ReorganizingBlock)}
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


def _is_of_transformers(vit: Any) -> bool:
    """Return whether `vit` is a transformers model, without importing transformers, which takes seconds."""
    transformers = sys.modules.get("transformers")
    return transformers is not None and isinstance(vit, transformers.PreTrainedModel)


def _huggingface() -> Any:
    """Return the module for transformers models; ValueError if transformers is too old."""
    version = importlib.metadata.version("transformers")
    release = re.match(r"(\d+)\.(\d+)", version)
    if release is None or tuple(map(int, release.groups())) < MINIMUM_TRANSFORMERS:
        raise ValueError(
            f"transformers {version} is not supported: its layers are others than those of "
            f"{'.'.join(map(str, MINIMUM_TRANSFORMERS))} and newer"
        )
    return importlib.import_module("evit_ext.patching.families.huggingface")


def _hint_of_wrapper(vit: nn.Module) -> str:
    for attribute in ("module", "model", "trunk"):
        if isinstance(getattr(vit, attribute, None), nn.Module):
            return f"; pass the model inside the wrapper (.{attribute})"
    return ""


def check_block(family: Family, block: nn.Module, location: int) -> None:
    """Raise ValueError unless a reorganising block of `family` can replace `block`."""
    if "forward" in block.__dict__:
        raise ValueError(
            f"block {location} has a forward of its own, in the place of its class's, as accelerate's hooks "
            "put there: call evit_ext.apply before that"
        )
    for kind, found, expected in (
        ("block", block, family.blocks),
        ("attention", getattr(block, family.attention, None), family.attentions),
    ):
        if type(found) in expected:
            continue
        what = f"block {location}" if kind == "block" else f"the attention of block {location}"
        reason = _REASONS.get(type(found).__name__)
        raise ValueError(
            f"{what} is a {_full_name(type(found))}, which is not supported: "
            + (reason or f"expected {' or '.join(map(_full_name, expected))}")
        )


def _full_name(cls: type) -> str:
    # With its module, because several of timm's models call their block "Block".
    return f"{cls.__module__}.{cls.__name__}"


def find_blocks(vit: Any) -> Blocks | None:
    """Return the blocks of `vit`, or None if it has no supported blocks."""
    if _is_of_transformers(vit):
        return _huggingface().find_blocks(vit)
    blocks = getattr(vit, "blocks", None)
    return blocks if isinstance(blocks, (nn.Sequential, nn.ModuleList)) else None


def cpu_forwards(vit: Any) -> Mapping[type[nn.Module], type[CpuForward]]:
    """Return, by module class, the CPU replacements for forwards inside the blocks of `vit`."""
    if _is_of_transformers(vit):
        return _huggingface().CPU_FORWARDS
    return _CPU_FORWARDS


def vision_tower(vit: Any) -> Any:
    """Return the vision model inside a transformers model, or `vit` itself for any other model."""
    return _huggingface().vision_tower(vit) if _is_of_transformers(vit) else vit


def reorganizing_blocks(vit: nn.Module) -> list[ReorganizingBlock]:
    """Return the reorganising blocks of `vit` in order; empty if `apply` was not called."""
    return [block for block in find_blocks(vit) or () if isinstance(block, ReorganizingBlock)]


def applied_blocks(vit: nn.Module) -> list[ReorganizingBlock]:
    """Return the reorganising blocks of `vit`; ValueError if there are none."""
    blocks = reorganizing_blocks(vit)
    if not blocks and hasattr(vit, "score_predictor"):
        raise ValueError(
            f"{type(vit).__name__} drops tokens by its score_predictor and has no block that reorganises "
            "them: expected a model that evit_ext.apply changed"
        )
    if not blocks:
        raise ValueError(
            f"{type(vit).__name__} has no block that reorganises tokens: call evit_ext.apply first"
            + (", and pass the model inside the wrapper (.module)" if hasattr(vit, "module") else "")
        )
    return blocks
