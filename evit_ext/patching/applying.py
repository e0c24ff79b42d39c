"""Turn a vision transformer into an EViT, and back."""

from __future__ import annotations

import numbers
import operator
from collections.abc import Sequence
from itertools import pairwise
from typing import TypeVar

from torch import nn

from evit_ext._util.messages import shown
from evit_ext._util.overriding import ReplicateOverrides, overrides, remove_overrides
from evit_ext.cpu import packed_weights
from evit_ext.patching import cpu_overrides
from evit_ext.patching.block import AdoptedBlock
from evit_ext.patching.families import FAMILIES, check_block, cpu_forwards, family_of, find_blocks
from evit_ext.patching.full_grid import FullGridIntermediates

Model = TypeVar("Model", bound=nn.Module)


def apply(
    vit: Model,
    keep_rate: float | Sequence[float] = 0.7,
    drop_loc: Sequence[int] | None = None,
    fuse_token: bool = True,
) -> Model:
    """Make a vision transformer drop the patches that receive the least attention; in place.

    Method of Liang et al., "Not All Patches are What You Need: Expediting Vision Transformers via Token
    Reorganizations" (ICLR 2022). Parameters and state-dict keys stay as they are. With keep rate 1 the model
    computes exactly what it did before, to the last bit. Below 1, on the CPU, all blocks run faster forwards,
    in training those of the attentions alone; results differ by rounding (:mod:`evit_ext.cpu.forward`).

    Args:
        vit: a vision transformer of timm (VisionTransformer, Eva, Beit) or of transformers (ViT, DeiT,
            DINOv2, CLIP, SigLIP). If it has no class token, patches are ranked by the attention of all
            tokens, averaged (:func:`evit_ext.ops.mean_attention`).
        keep_rate: share of the patch tokens that a reorganising block keeps, in (0, 1]; one number, or one
            for each reorganising block. ``ceil(keep_rate * patch tokens)`` are kept.
        drop_loc: numbers of the reorganising blocks, ascending, from 0; by default those at 1/4, 2/4 and 3/4
            of the depth, which are the paper's 3, 6, 9 of 12.
        fuse_token: fuse the patches that are not kept into one token, weighted by their scores; False
            discards them.

    Returns:
        `vit`.

    After a reorganising block there is no longer a token for every patch. ``forward_intermediates`` of timm's
    models still returns full grids, see :class:`evit_ext.patching.full_grid.FullGridIntermediates`. Hooks on
    a replaced block keep running, hooks on its ``attn`` only while the block keeps all patches.

    Raises:
        TypeError: `vit` is no module, a keep rate or block number is not a number, `fuse_token` not a bool.
        ValueError: the model is not supported (the message says why), or is an EViT already; a keep rate is
            not in (0, 1] or their number is wrong; `drop_loc` is empty, not ascending or out of range. The
            model is left as it was.

    Example:
        >>> vit = timm.create_model("vit_small_patch16_224.augreg_in1k")
        >>> logits = evit_ext.apply(vit, keep_rate=0.7)(images)
    """
    if not isinstance(vit, nn.Module):
        raise TypeError(f"vit must be a vision transformer, a torch module, got {type(vit).__name__}")
    if hasattr(vit, "_orig_mod"):
        raise ValueError(
            "the model is compiled: pass the one inside (._orig_mod), and compile it after evit_ext.apply"
        )
    if _is_changed(vit):
        raise ValueError(
            "the model reorganises tokens already: change its keep rate with evit_ext.set_keep_rate, or "
            "call evit_ext.remove first"
        )
    family = family_of(vit)
    blocks = family.find_blocks(vit)
    locations, rates = check_arguments(len(blocks), keep_rate, drop_loc, fuse_token)
    following = family.following if family.has_positions(vit) else None
    for number, block in enumerate(blocks):
        if number in locations or following is not None:
            check_block(family, block, number)
    num_prefix_tokens, class_token = family.num_prefix_tokens(vit), family.has_class_token(vit)
    for number, block in enumerate(blocks):
        stage = sum(location < number for location in locations)
        if number in locations:
            blocks[number] = family.blocks[type(block)](
                block, stage, rates[stage], num_prefix_tokens, fuse_token, class_token
            )
        elif following is not None:
            blocks[number] = following(block, stage)
    if following is not None:
        family.install(vit)
    cpu_overrides.install(find_blocks(vit) or nn.ModuleList(), cpu_forwards(vit))
    switch_cpu_forwards(vit, rates)
    if FullGridIntermediates.fits(vit):
        FullGridIntermediates(vit, "forward_intermediates").install()
    if overrides(vit):
        ReplicateOverrides(vit, "_replicate_for_data_parallel").install()
    return vit


def switch_cpu_forwards(vit: nn.Module, rates: Sequence[float]) -> None:
    """Switch the faster forwards for the CPU on, or off if every patch is kept.

    They round differently, and with keep rate 1 the model promises the original's results to the last bit.
    """
    cpu_overrides.set_active(find_blocks(vit) or nn.ModuleList(), min(rates) < 1)


def _is_changed(vit: nn.Module) -> bool:
    """Return whether `vit` has anything of :func:`apply`, even if its reorganising blocks are gone."""
    return bool(overrides(vit)) or any(isinstance(b, AdoptedBlock) for b in find_blocks(vit) or ())


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
        raise TypeError(f"fuse_token must be True or False, got {shown(fuse_token)}")
    locations = _locations(drop_loc, depth)
    return locations, check_keep_rates(keep_rate, len(locations))


def remove(vit: Model) -> Model:
    """Undo :func:`apply`: put the original blocks back, with the parameters the model has now; in place.

    Args:
        vit: a model that :func:`apply` changed; any other model is returned as it is.

    Returns:
        `vit`.

    Raises:
        RuntimeError: the class of a block has changed since, as ``fully_shard`` does.
    """
    inner: nn.Module = getattr(vit, "_orig_mod", vit)  # torch.compile's wrapper hands attributes on
    blocks = find_blocks(inner) or nn.ModuleList()
    for number, block in enumerate(blocks):
        if isinstance(block, AdoptedBlock) and not type(block).__module__.startswith("evit_ext."):
            raise RuntimeError(
                f"block {number} became a {type(block).__name__} after evit_ext.apply, as by fully_shard or "
                "a parametrization of the block: undo that first"
            )
    for number, block in enumerate(blocks):
        if isinstance(block, AdoptedBlock):
            blocks[number] = block.original()
    cpu_overrides.uninstall(blocks)
    packed_weights.let_go(blocks.modules())
    remove_overrides(inner)
    for family in FAMILIES:
        if family.model is not None and isinstance(inner, family.model):
            family.uninstall(inner)
    return vit


def _locations(drop_loc: Sequence[int] | None, depth: int) -> list[int]:
    """Return the checked numbers of the reorganising blocks of a model with `depth` blocks."""
    if drop_loc is None:
        return sorted({depth * quarter // 4 for quarter in (1, 2, 3)})
    expected = "drop_loc must be a sequence of block numbers, such as (3, 6, 9)"
    if isinstance(drop_loc, (str, bytes)) or not hasattr(drop_loc, "__iter__"):
        raise TypeError(f"{expected}, got {shown(drop_loc)}")
    locations = []
    for location in drop_loc:
        if isinstance(location, bool) or not hasattr(location, "__index__"):
            raise TypeError(f"{expected}, got {shown(drop_loc)}")
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


def check_keep_rates(keep_rate: float | Sequence[float], number: int) -> list[float]:
    """Return `number` keep rates, one for each reorganising block.

    Raises:
        TypeError: a keep rate is not a number.
        ValueError: a keep rate is not in (0, 1], or their number is wrong.
    """
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
            raise TypeError(
                f"keep_rate must be a number in (0, 1], or a list or tuple of them, got {shown(rate)}"
            )
        # Written so that NaN is refused.
        if not 0 < float(rate) <= 1:
            raise ValueError(f"keep_rate must be in (0, 1], got {rate}")
    return [float(rate) for rate in rates]
