"""Turn a vision transformer into an EViT, and back."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, TypeVar

from torch import nn

from evit_ext._util.messages import shown
from evit_ext._util.overriding import ReplicateOverrides, overrides, remove_overrides
from evit_ext._util.wrappers import WRAPPED, unwrapped
from evit_ext.cpu import packed_weights, replacing
from evit_ext.cpu.patch_projection import patch_projection_forward, patch_projections
from evit_ext.cpu.replacing import Forward
from evit_ext.patching.block import AdoptedBlock
from evit_ext.patching.families import Family, check_block, family_of, locate
from evit_ext.patching.full_grid import FullGridHiddenStates, FullGridIntermediates
from evit_ext.patching.token_sizes import TokenSizes
from evit_ext.tokens.evit import EViT
from evit_ext.tokens.keep_rate import check_keep_rates
from evit_ext.tokens.rule import WANTED, Rule
from evit_ext.tokens.stage import find_stages

Model = TypeVar("Model", bound=nn.Module)


def apply(
    vit: Model,
    keep_rate: float | Sequence[float] | None = None,
    drop_loc: Sequence[int] | None = None,
    fuse_token: bool | None = None,
    *,
    rule: Rule | Sequence[Rule] | None = None,
    num_prefix_tokens: int | None = None,
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
            for each reorganising block; 0.7 by default. ``ceil(keep_rate * patch tokens)`` are kept.
        drop_loc: numbers of the reorganising blocks, ascending, from 0; by default those at 1/4, 2/4 and 3/4
            of the depth, which are the paper's 3, 6, 9 of 12.
        fuse_token: fuse the patches that are not kept into one token, weighted by their scores, as by
            default; False discards them.
        rule: how a reorganising block reduces its tokens, in the place of EViT's rule: any
            :class:`evit_ext.tokens.Rule`, or one for each block. Its settings are its own: `keep_rate` and
            `fuse_token` must then be left out.
        num_prefix_tokens: how many tokens before the patches are always kept; by default those that the model
            says it has. Prompts that other code puts between the class token and the patches count.

    Returns:
        `vit`.

    After a reorganising block there is no longer a token for every patch. ``forward_intermediates`` of timm's
    models still returns full grids, see :class:`evit_ext.patching.full_grid.FullGridIntermediates`. Hooks on
    blocks and on what they hold keep running; an attention that has hooks, or a forward that other code
    replaced, is called as a whole, which is slower.

    Raises:
        TypeError: `vit` is no module, a keep rate or block number is not a number, `fuse_token` not a bool,
            or `rule` no rule.
        ValueError: the model is not supported (the message says why), or is an EViT already; a keep rate is
            not in (0, 1] or their number is wrong; `drop_loc` is empty, not ascending or out of range; or
            `rule` comes with `keep_rate` or `fuse_token`. The model is left as it was.

    Example:
        >>> vit = timm.create_model("vit_small_patch16_224.augreg_in1k")
        >>> logits = evit_ext.apply(vit, keep_rate=0.7)(images)
    """
    family = supported(vit)
    holder = family.vision_tower(vit)
    blocks = family.find_blocks(holder)
    assert blocks is not None
    locations = check_locations(len(blocks), drop_loc)
    rules = check_rules(len(locations), keep_rate, fuse_token, rule)
    prefix = family.num_prefix_tokens(holder) if num_prefix_tokens is None else _prefix(num_prefix_tokens)
    replace_blocks(vit, family, locations, rules, prefix)
    return vit


def supported(vit: nn.Module) -> Family:
    """Return the family of a model that may be given to :func:`apply`.

    Raises:
        TypeError, ValueError: as :func:`apply`.
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
    return family_of(vit)


def replace_blocks(
    vit: nn.Module,
    family: Family,
    locations: Sequence[int],
    rules: Sequence[Rule],
    num_prefix_tokens: int,
    after_mlp: bool = False,
) -> None:
    """Put blocks that reorganise, by `rules`, in the places `locations`; see :func:`apply`.

    Args:
        vit: a model that :func:`supported` accepts.
        family: what it returned.
        locations: numbers of blocks, ascending.
        rules: one for each of them.
        num_prefix_tokens: tokens before the patches.
        after_mlp: see :class:`evit_ext.patching.block.ReorganizingBlock`.

    Raises:
        ValueError: a block cannot be replaced. The model is left as it was.
    """
    holder = family.vision_tower(vit)
    blocks = family.find_blocks(holder)
    assert blocks is not None
    class_token, has_positions = family.has_class_token(holder), family.has_positions(holder)
    token_sizes = TokenSizes() if any("sizes" in rule.wants() for rule in rules) else None
    # Blocks before the first that reduces tokens see all of them, each of one patch.
    following_from = 0 if has_positions else len(blocks) if token_sizes is None else locations[0]
    for number, block in enumerate(blocks):
        if number in locations or number >= following_from:
            check_block(family, block, number)
    for number, block in enumerate(blocks):
        stage = sum(location < number for location in locations)
        last = number == len(blocks) - 1
        if number in locations:
            replacement = family.blocks[type(block)]
            blocks[number] = replacement(
                block, stage, rules[stage], num_prefix_tokens, class_token, token_sizes, last, after_mlp
            )
        elif number >= following_from:
            carrier = token_sizes if stage else None
            blocks[number] = family.following[type(block)](block, stage, carrier, last)
    if has_positions:
        family.install(holder)
    forwards: dict[type[nn.Module], Forward] = {nn.Conv2d: patch_projection_forward, **family.cpu_forwards}
    inner = [unwrapped(block) for block in blocks]
    parts = [unwrapped(part) for block in inner for part in block.children()]
    replacing.replace([*patch_projections(holder), *inner, *parts], forwards)
    switch_cpu_forwards(vit)
    if FullGridIntermediates.fits(holder):
        FullGridIntermediates(holder, "forward_intermediates").install()
    if FullGridHiddenStates.fits(holder):
        FullGridHiddenStates(holder.encoder, "forward").install()
    for module in holder.modules():
        if overrides(module):
            ReplicateOverrides(module, "_replicate_for_data_parallel").install()


def switch_cpu_forwards(vit: nn.Module) -> None:
    """Switch the faster forwards for the CPU on, or off if every patch is kept.

    They round differently, and with keep rate 1 the model promises the original's results to the last bit.
    """
    located = locate(vit)
    if located is not None:
        active = any(stage.keep_rate is None or stage.keep_rate < 1 for stage in find_stages(vit))
        replacing.set_active(located.vit.modules(), active)


def _is_changed(vit: nn.Module) -> bool:
    """Return whether `vit` has anything of :func:`apply`, even if its reorganising blocks are gone."""
    located = locate(vit)
    if located is None:
        return False
    adopted = any(isinstance(unwrapped(block), AdoptedBlock) for block in located.blocks)
    return adopted or bool(overrides(located.vit))


def check_rules(
    number: int,
    keep_rate: float | Sequence[float] | None = None,
    fuse_token: bool | None = None,
    rule: Rule | Sequence[Rule] | None = None,
) -> list[Rule]:
    """Return the rules of `number` reorganising blocks, given what :func:`apply` is given.

    Raises:
        TypeError, ValueError: as :func:`apply`.
    """
    if rule is None:
        rates = check_keep_rates(0.7 if keep_rate is None else keep_rate, number)
        return [EViT(rate, fuse_token is None or fuse_token) for rate in rates]
    if keep_rate is not None or fuse_token is not None:
        raise ValueError(
            "a rule has settings of its own: leave out keep_rate and fuse_token, or give no rule, which is "
            f"EViT's; got {shown(rule)} with keep_rate={shown(keep_rate)}, fuse_token={shown(fuse_token)}"
        )
    rules: list[Any] = list(rule) if isinstance(rule, (list, tuple)) else [rule] * number
    if len(rules) != number:
        raise ValueError(
            f"rule must be one rule or {number}, one for each reorganising block, got {len(rules)}"
        )
    for one in rules:
        if not isinstance(one, Rule):
            raise TypeError(
                "rule must be a rule, such as evit_ext.tokens.EViT(0.7), or one for each reorganising block, "
                f"got {shown(one)}"
            )
        if missing := frozenset(one.wants()) - WANTED:
            raise ValueError(
                f"the rule {one.name} wants {', '.join(sorted(missing))}, which no attention returns: it is "
                "for models of evit_ext.models that have them"
            )
    return rules


def _prefix(num_prefix_tokens: int) -> int:
    if isinstance(num_prefix_tokens, bool) or not hasattr(num_prefix_tokens, "__index__"):
        raise TypeError(f"num_prefix_tokens must be a whole number, got {shown(num_prefix_tokens)}")
    if operator.index(num_prefix_tokens) < 0:
        raise ValueError(f"num_prefix_tokens must not be negative, got {num_prefix_tokens}")
    return operator.index(num_prefix_tokens)


def remove(vit: Model) -> Model:
    """Undo :func:`apply`: put the original blocks back, with the parameters the model has now; in place.

    Blocks are found inside wrappers, such as those of torch's activation checkpointing.

    Args:
        vit: a model that :func:`apply` changed; any other model is returned as it is.

    Returns:
        `vit`.

    Raises:
        RuntimeError: a block cannot be put back: its class has changed since, as ``fully_shard`` does, or it
            is inside FSDP or another wrapper that would keep the replaced one.
    """
    located = locate(vit)
    if located is None:
        return vit
    family, holder, blocks = located
    for number, block in enumerate(blocks):
        inner = unwrapped(block)
        if isinstance(inner, AdoptedBlock) and not type(inner).__module__.startswith("evit_ext."):
            raise RuntimeError(
                f"block {number} became a {type(inner).__name__} after evit_ext.apply, as by fully_shard or "
                "a parametrization of the block: undo that first"
            )
        if isinstance(inner, AdoptedBlock) and "forward" in inner.__dict__:
            raise RuntimeError(
                f"block {number} got a forward of its own after evit_ext.apply, which would be lost: take it "
                "away first"
            )
        if isinstance(inner, AdoptedBlock) and _has_fsdp(block):
            raise RuntimeError(
                f"block {number} is inside FullyShardedDataParallel: call evit_ext.remove before wrapping"
            )
    for number, block in enumerate(blocks):
        _put_back(blocks, str(number), block)
    replacing.restore(holder.modules())
    packed_weights.discard(holder.modules())
    for module in (holder, *vit.modules()):  # a language model around it may have overrides too
        remove_overrides(module)
    family.uninstall(holder)
    return vit


def _put_back(parent: nn.Module, name: str, block: nn.Module) -> None:
    """Replace an adopted block, or the one inside the wrapper `block`, by the original."""
    if isinstance(block, AdoptedBlock):
        setattr(parent, name, block.original())
        return
    for wrapped, inner in list(block.named_children()):
        if wrapped in WRAPPED and isinstance(unwrapped(inner), AdoptedBlock):
            _put_back(block, wrapped, inner)
            if hasattr(block, "dynamo_ctx"):
                block._initialize()  # type: ignore[operator]  # torch.compile's wrapper holds a forward


def _has_fsdp(block: nn.Module) -> bool:
    return any(type(module).__name__ == "FullyShardedDataParallel" for module in block.modules())


def check_locations(depth: int, drop_loc: Sequence[int] | None) -> list[int]:
    """Return the checked numbers of the reorganising blocks of a model with `depth` blocks.

    Raises:
        TypeError, ValueError: as :func:`apply`.
    """
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
