"""What :func:`evit_ext.apply` needs to know about a family of models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from evit_ext.cpu.replacing import Forward
from evit_ext.patching.block import AdoptedBlock, ReorganizingBlock

Blocks = nn.Sequential | nn.ModuleList


def _itself(model: Any) -> Any:
    return model


def _blocks_of_timm(vit: Any) -> Blocks | None:
    blocks = getattr(vit, "blocks", None)
    return blocks if isinstance(blocks, (nn.Sequential, nn.ModuleList)) else None


def _prefix_tokens_of_timm(vit: Any) -> int:
    return int(vit.num_prefix_tokens)


def _class_token_of_timm(vit: Any) -> bool:
    # The number of prefix tokens does not answer this: timm counts register tokens among them.
    return getattr(vit, "cls_token", None) is not None


def _patch_grid_of_timm(vit: Any, img_size: tuple[int, int]) -> tuple[int, int]:
    rows, columns = vit.patch_embed.dynamic_feat_size(img_size)
    return int(rows), int(columns)


def _nothing(vit: Any) -> None:
    pass


@dataclass(frozen=True)
class Family:
    """A family of models. Classes are compared exactly: a subclass is free to compute something else.

    The functions take the module that holds the blocks, which is the model itself except in `vision_tower`.

    Attributes:
        name: for messages.
        model: the class of the models, subclasses included; None accepts any model with these blocks.
        blocks: the replacement for each block class that can be replaced.
        attentions: the attention classes that such a block may hold.
        attention: the attribute of a block that holds its attention.
        following: the replacements for blocks that do not reorganise, used if `has_positions`, or if sizes of
            tokens are handed from block to block.
        has_positions: returns whether the model passes positions of the tokens to its blocks.
        install: prepares the rest of the model, if `has_positions`.
        uninstall: undoes `install`.
        vision_tower: returns the module inside a model that holds the blocks, or None if there is none.
        find_blocks: returns the blocks, or None.
        num_prefix_tokens: returns the number of tokens before the patches.
        has_class_token: returns whether the first token is a class token.
        patch_grid: returns the rows and columns of the patches of an image of (height, width).
        cpu_forwards: the CPU replacement of the forward, by module class.
    """

    name: str
    model: type[nn.Module] | None
    blocks: Mapping[type[nn.Module], type[ReorganizingBlock]]
    attentions: tuple[type[nn.Module], ...]
    attention: str = "attn"
    following: Mapping[type[nn.Module], type[AdoptedBlock]] = field(default_factory=dict)
    has_positions: Callable[[Any], bool] = lambda vit: False
    install: Callable[[Any], None] = _nothing
    uninstall: Callable[[Any], None] = _nothing
    vision_tower: Callable[[Any], Any] = _itself
    find_blocks: Callable[[Any], Blocks | None] = _blocks_of_timm
    num_prefix_tokens: Callable[[Any], int] = _prefix_tokens_of_timm
    has_class_token: Callable[[Any], bool] = _class_token_of_timm
    patch_grid: Callable[[Any, tuple[int, int]], tuple[int, int]] = _patch_grid_of_timm
    cpu_forwards: Mapping[type[nn.Module], Forward] = field(default_factory=dict)
