"""The model families that :func:`evit_ext.apply` supports.

Each family is a module of this package. It defines which block classes can be replaced, by what, and how
positions reach the blocks. To support other models of timm, add a module and its family to
``timm_models.FAMILIES``; for those of transformers, a line to ``huggingface.TOWERS``.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import re
import sys
from typing import Any, NamedTuple

from torch import nn

from evit_ext._util.wrappers import unwrapped
from evit_ext.patching.block import AdoptedBlock
from evit_ext.patching.families import timm_models
from evit_ext.patching.families.family import Blocks, Family
from evit_ext.tokens.stage import Stage

__all__ = [
    "Blocks",
    "Family",
    "Located",
    "check_block",
    "drop_locations",
    "family_of",
    "locate",
]

#: The first release of transformers whose vision models have the layers that evit_ext knows.
MINIMUM_TRANSFORMERS = (5, 18)


class Located(NamedTuple):
    """Where the blocks of a model are.

    Attributes:
        family: of the model.
        vit: the module that holds the blocks, out of all wrappers.
        blocks: as the module holds them; each may be wrapped, see :func:`unwrapped`.
    """

    family: Family
    vit: Any
    blocks: Blocks


def locate(model: nn.Module) -> Located | None:
    """Return where the blocks of `model` are, whatever wraps it; None if it has none that are known.

    Of several models in one, it is the one that :func:`evit_ext.apply` changed, else the first.
    """
    first: Located | None = None
    for module in model.modules():
        # Wrappers hand the attributes of what they wrap on, and so look like it.
        family = _library(module).find(module) if unwrapped(module) is module else None
        if family is not None:
            vit = family.vision_tower(module)
            found = Located(family, vit, family.find_blocks(vit))
            if any(isinstance(unwrapped(block), AdoptedBlock) for block in found.blocks):
                return found
            first = found if first is None else first
    return first


def drop_locations(vit: Any) -> list[int]:
    """Return the numbers of the blocks at which the tokens of `vit` are reduced."""
    if hasattr(vit, "drop_loc"):
        return list(vit.drop_loc)
    located = locate(vit)
    if located is None:
        return []
    return [number for number, block in enumerate(located.blocks) if isinstance(unwrapped(block), Stage)]


def family_of(vit: nn.Module) -> Family:
    """Return the family of `vit`; a ValueError explains why it belongs to none."""
    family: Family = _library(vit).family_of(vit)
    return family


def _library(model: Any) -> Any:
    """Return the module for models of transformers, or the one for timm's; transformers is not imported.

    Raises:
        ValueError: it is a model of transformers, of a version that is too old.
    """
    transformers = sys.modules.get("transformers")
    if transformers is None or not isinstance(model, transformers.PreTrainedModel):
        return timm_models
    version = importlib.metadata.version("transformers")
    release = re.match(r"(\d+)\.(\d+)", version)
    if release is None or tuple(map(int, release.groups())) < MINIMUM_TRANSFORMERS:
        raise ValueError(
            f"transformers {version} is not supported: its layers are others than those of "
            f"{'.'.join(map(str, MINIMUM_TRANSFORMERS))} and newer"
        )
    return importlib.import_module("evit_ext.patching.families.huggingface")


def check_block(family: Family, block: nn.Module, location: int) -> None:
    """Raise ValueError unless a reorganising block of `family` can replace `block`."""
    if unwrapped(block) is not block:
        raise ValueError(
            f"block {location} is wrapped in a {type(block).__name__}: call evit_ext.apply before that"
        )
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
        reason = timm_models.REASONS.get(type(found).__name__)
        raise ValueError(
            f"{what} is a {_full_name(type(found))}, which is not supported: "
            + (reason or f"expected {' or '.join(map(_full_name, expected))}")
        )


def _full_name(cls: type) -> str:
    # With its module, because several of timm's models call their block "Block".
    return f"{cls.__module__}.{cls.__name__}"
