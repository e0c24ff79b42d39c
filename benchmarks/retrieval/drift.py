"""How far the class token of a reduced model is from the full model's, block by block, and where that begins.

Notation: B images, N tokens, P prefix tokens, L blocks, K kept patches, C channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import evit_ext
from evit_ext import ops
from evit_ext.tokens import Rule

from .neighbours import cosine


class Watched(NamedTuple):
    """What a forward of the full model showed.

    Attributes:
        class_tokens: after the embedding and after each block, [L + 1, B, C].
        attention: of the class token to each token, the mean over heads, by block, [L, B, N].
        norms: of each token that enters a block, [L, B, N].
    """

    class_tokens: Tensor
    attention: Tensor
    norms: Tensor


@contextmanager
def class_tokens(vit: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the class token [B, C] that leaves each block of a model, of one forward."""
    found: list[Tensor] = []
    handles = [
        block.register_forward_hook(lambda module, given, out: found.append(out[:, 0].clone()))
        for block in vit.blocks
    ]
    yield found
    for handle in handles:
        handle.remove()


@torch.no_grad()
def watch(
    vit: nn.Module,
    images: Tensor,
    stages: Sequence[int] = (),
    kept: Sequence[Tensor] = (),
    of_class: bool = True,
    of_patches: bool = True,
) -> Watched:
    """Run the full model, in which some tokens attend only to the patches that a reduced one has left.

    Args:
        vit: a VisionTransformer of timm, not reduced.
        images: [B, 3, H, W].
        stages: numbers of the blocks after whose attention patches are dropped.
        kept: for each of them, the patches that are left, int64 [B, K].
        of_class: the class token attends only to these.
        of_patches: the patches do. With both, the class token is that of the model which drops the others.

    Returns:
        What the forward showed; with nothing masked, what the model computes.
    """
    x = vit.norm_pre(vit._pos_embed(vit.patch_embed(images)))
    prefix, tokens = vit.num_prefix_tokens, x.shape[1]
    found, attention, norms = [x[:, 0]], [], []
    for number, block in enumerate(vit.blocks):
        norms.append(x.norm(dim=2))
        mask = None
        if before := [stage for stage, location in enumerate(stages) if location < number]:
            is_left = torch.zeros(len(x), tokens, dtype=torch.bool)
            is_left[:, :prefix] = True
            is_left.scatter_(1, kept[before[-1]] + prefix, True)
            mask = is_left[:, None, None].repeat(1, 1, tokens, 1)
            mask[:, :, :prefix] |= not of_class
            mask[:, :, prefix:] |= not of_patches
        qkv = block.attn.qkv(block.norm1(x)).unflatten(2, (3, block.attn.num_heads, -1))
        q, k, _ = qkv.permute(2, 0, 3, 1, 4)
        attention.append(ops.class_attention(q[:, :, 0], k))
        x = block(x, attn_mask=mask)
        found.append(x[:, 0])
    return Watched(torch.stack(found), torch.stack(attention), torch.stack(norms))


def by_block(one: Tensor, other: Tensor) -> Tensor:
    """Return the mean cosine over the images, block by block, [L], of class tokens [L, B, C]."""
    return cosine(one, other).mean(dim=1)


def kept_by(vit: nn.Module, images: Tensor, rule: Rule, stages: Sequence[int]) -> list[Tensor]:
    """Return the patches that are left after each of the blocks `stages`, int64 [B, K] each."""
    evit_ext.apply(vit, rule=rule, drop_loc=stages)
    with torch.no_grad(), evit_ext.record_tokens(vit) as record:
        vit(images)
    evit_ext.remove(vit)
    return record.kept


def masked(
    vit: nn.Module, images: Tensor, stages: Sequence[int], kept: Sequence[Tensor], full: Watched
) -> dict[str, float]:
    """Return the mean cosine of the embedding to the full model's, if some tokens attend to `kept` only."""
    whole = vit.norm(full.class_tokens[-1])
    found = {}
    for name, of_class, of_patches in (
        ("class token", True, False),
        ("patches", False, True),
        ("both", True, True),
    ):
        last = watch(vit, images, stages, kept, of_class, of_patches).class_tokens[-1]
        found[name] = cosine(vit.norm(last), whole).mean().item()
    return found


def attention_kept(full: Watched, stages: Sequence[int], kept: Sequence[Tensor], prefix: int) -> list[float]:
    """Return how much of the full model's class attention to patches goes to those in `kept`, block by block.

    In block number 0 and those up to the first stage, all; the mean over the images.
    """
    found = []
    for number, attention in enumerate(full.attention[:, :, prefix:]):
        before = [stage for stage, location in enumerate(stages) if location < number]
        of_kept = attention.gather(1, kept[before[-1]]) if before else attention
        found.append((of_kept.sum(dim=1) / attention.sum(dim=1)).mean().item())
    return found


def fused_tokens(
    vit: nn.Module, images: Tensor, rule: Rule, stages: Sequence[int], full: Watched
) -> list[dict[str, float]]:
    """Return what becomes of fused tokens, a line for each stage that comes after one was made.

    "attention" is the class token's to the fused tokens, and "attention, full model" its to the patches that
    have no token of their own any more; "norm" is that of the newest fused token as it leaves the block that
    made it, over the median of the kept ones there.
    """
    norms: list[float] = []

    def keep_norm(module: nn.Module, given: object, out: Tensor) -> None:
        of_tokens = out[:, vit.num_prefix_tokens :].norm(dim=2)
        norms.append((of_tokens[:, -1] / of_tokens[:, :-1].median(dim=1).values).mean().item())

    evit_ext.apply(vit, rule=rule, drop_loc=stages)
    handles = [vit.blocks[location].register_forward_hook(keep_norm) for location in stages]
    with torch.no_grad(), evit_ext.record_tokens(vit) as record:
        vit(images)
    for handle in handles:
        handle.remove()
    evit_ext.remove(vit)
    found = []
    for stage, location in list(enumerate(stages))[1:]:
        entering = record.trail.patches(stage)
        assert entering is not None
        of_patches = full.attention[location, :, vit.num_prefix_tokens :]
        own = of_patches.gather(1, entering.clamp(min=0)).masked_fill(entering < 0, 0).sum(dim=1)
        found.append(
            {
                "block": location,
                "attention": (record.scores[stage] * (entering < 0)).sum(dim=1).mean().item(),
                "attention, full model": (of_patches.sum(dim=1) - own).mean().item(),
                "norm": norms[stage - 1],
            }
        )
    return found


def averaged(parts: Sequence[Any]) -> Any:
    """Return the mean of what batches of images gave, in the same nesting of dicts and lists.

    Args:
        parts: one for each batch: dicts with the number of "images", by which the mean is weighted.
    """
    weights = [part["images"] for part in parts]

    def mean(values: Sequence[Any]) -> Any:
        if isinstance(values[0], dict):
            return {name: mean([value[name] for value in values]) for name in values[0]}
        if isinstance(values[0], list):
            return [mean(each) for each in zip(*values, strict=True)]
        return sum(w * value for w, value in zip(weights, values, strict=True)) / sum(weights)

    return {**mean(parts), "images": sum(weights)}
