"""What :func:`evit_ext.apply` has to know of a family of models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from evit_ext.block import AdoptedBlock, ReorganizingBlock
from evit_ext.cpu_forward import CpuForward

Blocks = nn.Sequential | nn.ModuleList


def _blocks_of_timm(vit: Any) -> Blocks:
    return vit.blocks


def _prefix_tokens_of_timm(vit: Any) -> int:
    return int(vit.num_prefix_tokens)


def _class_token_of_timm(vit: Any) -> bool:
    # timm counts register tokens as prefix tokens too, so their number does not tell about a class token.
    return getattr(vit, "cls_token", None) is not None


def _nothing(vit: Any) -> None:
    pass


@dataclass(frozen=True)
class Family:
    """A family of models. Classes are compared exactly: a subclass is free to compute something else.

    Attributes:
        name: for messages.
        model: the class of the models, subclasses included; None for any that has such blocks.
        blocks: for each block class that can be replaced, by what.
        attentions: the attentions that such a block may hold.
        attention: the attribute of a block that holds it.
        following: what takes the place of the blocks that do not reorganise, where `has_positions`.
        has_positions: whether the model tells its blocks the positions of the tokens.
        install: prepares the model beyond its blocks, where `has_positions`.
        uninstall: undoes `install`.
        find_blocks: returns the blocks of a model.
        num_prefix_tokens: returns how many tokens stand before the patches.
        has_class_token: returns whether the first of them is a class token.
        cpu_forwards: for classes of modules in a block, what takes the place of their forward.
    """

    name: str
    model: type[nn.Module] | None
    blocks: Mapping[type[nn.Module], type[ReorganizingBlock]]
    attentions: tuple[type[nn.Module], ...]
    attention: str = "attn"
    following: type[AdoptedBlock] | None = None
    has_positions: Callable[[Any], bool] = lambda vit: False
    install: Callable[[Any], None] = _nothing
    uninstall: Callable[[Any], None] = _nothing
    find_blocks: Callable[[Any], Blocks] = _blocks_of_timm
    num_prefix_tokens: Callable[[Any], int] = _prefix_tokens_of_timm
    has_class_token: Callable[[Any], bool] = _class_token_of_timm
    cpu_forwards: Mapping[type[nn.Module], type[CpuForward]] = field(default_factory=dict)
