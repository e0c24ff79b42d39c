"""What :func:`evit_ext.apply` needs to know about a family of models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from evit_ext.cpu.forward import CpuForward
from evit_ext.patching.block import AdoptedBlock, ReorganizingBlock

Blocks = nn.Sequential | nn.ModuleList


def _blocks_of_timm(vit: Any) -> Blocks:
    return vit.blocks


def _prefix_tokens_of_timm(vit: Any) -> int:
    return int(vit.num_prefix_tokens)


def _class_token_of_timm(vit: Any) -> bool:
    # The number of prefix tokens does not answer this: timm counts register tokens among them.
    return getattr(vit, "cls_token", None) is not None


def _nothing(vit: Any) -> None:
    pass


@dataclass(frozen=True)
class Family:
    """A family of models. Classes are compared exactly: a subclass is free to compute something else.

    Attributes:
        name: for messages.
        model: the class of the models, subclasses included; None accepts any model with these blocks.
        blocks: the replacement for each block class that can be replaced.
        attentions: the attention classes that such a block may hold.
        attention: the attribute of a block that holds its attention.
        following: the replacement for blocks that do not reorganise, used if `has_positions`.
        has_positions: returns whether the model passes positions of the tokens to its blocks.
        install: prepares the rest of the model, if `has_positions`.
        uninstall: undoes `install`.
        find_blocks: returns the blocks of a model.
        num_prefix_tokens: returns the number of tokens before the patches.
        has_class_token: returns whether the first token is a class token.
        cpu_forwards: the CPU replacement of the forward, by module class.
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
