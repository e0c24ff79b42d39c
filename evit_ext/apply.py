"""Turn a timm vision transformer into an EViT, change its keep rate, and turn it back."""

from __future__ import annotations

import numbers
import operator
from collections.abc import Sequence
from itertools import pairwise
from typing import TypeVar

from torch import nn

from evit_ext.block import SUPPORTED, ReorganizingBlock, reorganizing_blocks

Model = TypeVar("Model", bound=nn.Module)


def apply(
    vit: Model,
    keep_rate: float | Sequence[float] = 0.7,
    drop_loc: Sequence[int] | None = None,
    fuse_token: bool = True,
) -> Model:
    """Make `vit` drop the patches that its class token attends to least; in place.

    Method of Liang et al., "Not All Patches are What You Need: Expediting Vision Transformers via Token
    Reorganizations" (ICLR 2022). Parameters, state-dict keys and all other blocks stay as they are. With
    keep rate 1 the model computes what it did before, to the last bit.

    Args:
        vit: a timm VisionTransformer with a class token (ViT, DeiT, DeiT III, DINO, DINOv2, MAE, CLIP image
            towers …), distilled or with register tokens or not.
        keep_rate: share of the patch tokens that a reorganising block keeps, in (0, 1]; one number, or one
            for each reorganising block. ``ceil(keep_rate * patch tokens)`` are kept.
        drop_loc: numbers of the reorganising blocks, ascending, from 0; by default those at 1/4, 2/4 and 3/4
            of the depth, which are the paper's 3, 6, 9 of 12.
        fuse_token: fuse the patches that are not kept into one token, weighted by their scores; without it
            they are lost.

    Returns:
        `vit`.

    After a reorganising block there is no longer a token for every patch: what wants the full grid, such as
    ``forward_intermediates`` in NCHW layout, does not work on an EViT (ask for NLC, and `record_tokens` where
    each token was). Hooks on a replaced block go on running, hooks on its ``attn`` only while it keeps all
    patches.

    Raises:
        TypeError: `vit` is no module, a keep rate or block number is not a number, `fuse_token` not a bool.
        ValueError: the model is not supported (the message says why), or is an EViT already; a keep rate is
            not in (0, 1] or their number is wrong; `drop_loc` is empty, not ascending or out of range. The
            model is left as it was.

    Example:
        >>> vit = timm.create_model("vit_small_patch16_224.augreg_in1k")
        >>> logits = evit_ext.apply(vit, keep_rate=0.7)(images)
    """
    blocks = _supported_blocks(vit)
    if reorganizing_blocks(vit):
        raise ValueError(
            "the model reorganises tokens already: change its keep rate with evit_ext.set_keep_rate, or "
            "call evit_ext.remove first"
        )
    locations, rates = check_arguments(len(blocks), keep_rate, drop_loc, fuse_token)
    for location in locations:
        _check_block(blocks[location], location)
    num_prefix_tokens = int(vit.num_prefix_tokens)  # type: ignore[arg-type]
    for location, rate in zip(locations, rates, strict=True):
        blocks[location] = ReorganizingBlock(blocks[location], rate, num_prefix_tokens, fuse_token)
    return vit


def check_arguments(
    depth: int, keep_rate: float | Sequence[float], drop_loc: Sequence[int] | None, fuse_token: bool
) -> tuple[list[int], list[float]]:
    """Check what :func:`apply` is given for a model with `depth` blocks.

    Returns:
        The numbers of the reorganising blocks and their keep rates.

    Raises:
        TypeError, ValueError: as :func:`apply`.
    """
    if not isinstance(fuse_token, bool):
        raise TypeError(f"fuse_token must be True or False, got {fuse_token!r}")
    locations = _locations(drop_loc, depth)
    return locations, _keep_rates(keep_rate, len(locations))


def remove(vit: Model) -> Model:
    """Undo :func:`apply`: put the original blocks back, with the parameters the model has now; in place.

    Args:
        vit: a model that :func:`apply` changed. A model that it did not change is returned as it is.

    Returns:
        `vit`.
    """
    if reorganizing_blocks(vit):
        blocks: nn.Sequential = vit.blocks  # type: ignore[assignment]
        for location, block in enumerate(blocks):
            if isinstance(block, ReorganizingBlock):
                blocks[location] = block.original()
    return vit


def set_keep_rate(vit: Model, keep_rate: float | Sequence[float]) -> Model:
    """Change the keep rate of an EViT; in place, from the next forward on.

    Under ``torch.compile`` every new keep rate compiles the model again, and after
    ``torch._dynamo.config.recompile_limit`` of them (8 unless changed) torch stops compiling.

    Args:
        vit: a model that :func:`apply` changed.
        keep_rate: share of the patch tokens to keep, in (0, 1], or one for each reorganising block.

    Returns:
        `vit`.

    Raises:
        TypeError: a keep rate is not a number.
        ValueError: :func:`apply` was not called, a keep rate is not in (0, 1] or their number is wrong.
    """
    blocks = applied_blocks(vit)
    for block, rate in zip(blocks, _keep_rates(keep_rate, len(blocks)), strict=True):
        block.keep_rate = rate
    return vit


def applied_blocks(vit: nn.Module) -> list[ReorganizingBlock]:
    """Return the reorganising blocks of `vit`; ValueError if there are none."""
    blocks = reorganizing_blocks(vit)
    if not blocks and hasattr(vit, "score_predictor"):
        raise ValueError(f"{type(vit).__name__} drops tokens by its score_predictor: set its .keep_rate")
    if not blocks:
        raise ValueError(
            f"{type(vit).__name__} has no block that reorganises tokens: call evit_ext.apply first"
            + (", and pass the model inside the wrapper (.module)" if hasattr(vit, "module") else "")
        )
    return blocks


def _supported_blocks(vit: nn.Module) -> nn.Sequential | nn.ModuleList:
    """Return the blocks of `vit`, or raise what is said about a model that cannot be supported."""
    if not isinstance(vit, nn.Module):
        raise TypeError(f"vit must be a timm vision transformer, got {type(vit).__name__}")
    name = type(vit).__name__
    blocks = getattr(vit, "blocks", None)
    if not isinstance(blocks, (nn.Sequential, nn.ModuleList)) or len(blocks) == 0:
        hint = "; pass the model inside the wrapper (.module)" if hasattr(vit, "module") else ""
        raise ValueError(
            f"{name} is not supported: expected a vision transformer with its blocks in .blocks, as timm's "
            f"VisionTransformer has{hint}"
        )
    if hasattr(vit, "score_predictor"):
        raise ValueError(f"{name} is not supported: it drops tokens itself, by its score_predictor")
    # timm counts register tokens as prefix tokens too, so their number does not tell about a class token.
    if getattr(vit, "cls_token", None) is None or getattr(vit, "num_prefix_tokens", 0) < 1:
        raise ValueError(
            f"{name} is not supported: it has no class token (.cls_token), whose attention decides which "
            "patches are kept"
        )
    return blocks


def _check_block(block: nn.Module, location: int) -> None:
    """Raise ValueError unless `block` is one that a reorganising block can replace."""
    attentions = SUPPORTED.get(type(block))
    if attentions is None:
        raise ValueError(
            f"block {location} is a {_full_name(type(block))}, which is not supported: "
            f"expected {' or '.join(map(_full_name, SUPPORTED))}"
        )
    attention = getattr(block, "attn", None)
    if type(attention) not in attentions:
        raise ValueError(
            f"the attention of block {location} is a {_full_name(type(attention))}, which is not supported: "
            f"expected {' or '.join(map(_full_name, attentions))}"
        )


def _full_name(cls: type) -> str:
    # With its module, because several of timm's models call their block "Block".
    return f"{cls.__module__}.{cls.__name__}"


def _locations(drop_loc: Sequence[int] | None, depth: int) -> list[int]:
    """Return the checked numbers of the reorganising blocks of a model with `depth` blocks."""
    if drop_loc is None:
        return sorted({depth * quarter // 4 for quarter in (1, 2, 3)})
    expected = "drop_loc must be a sequence of block numbers, such as (3, 6, 9)"
    if isinstance(drop_loc, (str, bytes)) or not hasattr(drop_loc, "__iter__"):
        raise TypeError(f"{expected}, got {drop_loc!r}")
    locations = []
    for location in drop_loc:
        if isinstance(location, bool) or not hasattr(location, "__index__"):
            raise TypeError(f"{expected}, got {drop_loc!r}")
        locations.append(operator.index(location))
    if not locations:
        raise ValueError(f"{expected}, got none")
    if min(locations) < 0 or max(locations) >= depth:
        raise ValueError(
            f"drop_loc must be in [0, {depth}), the model's blocks, got {tuple(locations)}; None takes the "
            "blocks at the quarters of the depth"
        )
    if any(later <= earlier for earlier, later in pairwise(locations)):
        raise ValueError(f"drop_loc must be ascending, without repetition, got {tuple(locations)}")
    return locations


def _keep_rates(keep_rate: float | Sequence[float], number: int) -> list[float]:
    """Return `number` checked keep rates."""
    if isinstance(keep_rate, (list, tuple)):
        rates = list(keep_rate)
        if len(rates) != number:
            raise ValueError(
                f"keep_rate must be one number or {number}, one for each reorganising block, got {len(rates)}"
            )
    else:
        rates = [keep_rate] * number
    for rate in rates:
        if isinstance(rate, bool) or not isinstance(rate, numbers.Real):
            raise TypeError(f"keep_rate must be a number in (0, 1], or a list or tuple of them, got {rate!r}")
        # Written so that NaN is refused.
        if not 0 < float(rate) <= 1:
            raise ValueError(f"keep_rate must be in (0, 1], got {rate}")
    return [float(rate) for rate in rates]
