"""What a model computes for images at several keep rates: predictions, and the patches each stage kept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from timm.utils.model import unwrap_model
from torch import Tensor, nn

from evit_ext.cost.macs import count_macs
from evit_ext.cost.tokens import patch_grid
from evit_ext.patching.applying import switch_cpu_forwards
from evit_ext.patching.families import locate
from evit_ext.patching.keep_rates import set_keep_rate
from evit_ext.patching.recording import TokenRecord, record_tokens
from evit_ext.tokens.rule import Rule
from evit_ext.tokens.stage import stages_of


@dataclass(frozen=True)
class StageView:
    """One stage of one image; patches lie on a grid of rows and columns.

    Attributes:
        kept: bool [rows, columns], the patches that remain after the stage.
        scores: float32 [rows, columns], of the patches that entered the stage; NaN for those that earlier
            stages had dropped. A fused token has no place on the grid, so its score is not here.
        dropped: how many patches the stage dropped.
        fused: whether it fused them into a token.
        groups: int64 [rows, columns], for each patch the number of the token that stands for it after the
            stage, where tokens are merged into others that stay; None where the rule merges none.
    """

    kept: Tensor
    scores: Tensor
    dropped: int
    fused: bool
    groups: Tensor | None = None


@dataclass(frozen=True)
class RateView:
    """One image at one keep rate.

    Attributes:
        keep_rate: share of the patches that a stage keeps.
        stages: one for each stage.
        probabilities: float32 [classes], the softmax of the logits; None for a model without classes.
        macs: multiply-accumulates of the forward, see :func:`evit_ext.count_macs`.
    """

    keep_rate: float
    stages: tuple[StageView, ...]
    probabilities: Tensor | None
    macs: int


@dataclass(frozen=True)
class ImageView:
    """One image, with all patches and at several keep rates.

    Attributes:
        grid: rows and columns of the patches.
        dense: the view at keep rate 1.
        rates: the views at the requested keep rates, in their order.
    """

    grid: tuple[int, int]
    dense: RateView
    rates: tuple[RateView, ...]


def view_images(model: nn.Module, images: Tensor, keep_rates: Sequence[float]) -> list[ImageView]:
    """Run `model` on images with all patches and at several keep rates.

    It runs in eval mode without gradients; afterwards its mode and keep rate are what they were.

    Args:
        model: one that :func:`evit_ext.apply` changed, of timm or of transformers, or a DynamicViT.
        images: float [B, channels, height, width], prepared for the model, on its device; B at least 1.
        keep_rates: each in (0, 1], at least one.

    Returns:
        An :class:`ImageView` for each image. All tensors are on the CPU.

    Raises:
        TypeError: a keep rate is not a number.
        ValueError: the model drops no patches, `images` are of another shape, a keep rate is out of range,
            the image's sides are padded to whole patches, or the model computes NaN.
    """
    vit: Any = unwrap_model(model)
    if images.dim() != 4 or not len(images):
        raise ValueError(f"images must be [B, channels, height, width], got {list(images.shape)}")
    if not keep_rates:
        raise ValueError("keep_rates must have at least one, got none")
    stages_of(vit)
    size = (images.shape[2], images.shape[3])
    grid = _whole_grid(vit, size)
    before = [stage.rule for stage in stages_of(vit)]
    modes = {module: module.training for module in model.modules()}  # some may be frozen in eval mode
    model.eval()
    try:
        everything = _at_rate(model, images, 1.0, grid, size)
        rates = [_at_rate(model, images, rate, grid, size) for rate in keep_rates]
    finally:
        for module, training in modes.items():
            module.training = training
        for stage, rule in zip(stages_of(vit), before, strict=True):
            stage.rule = rule
        switch_cpu_forwards(vit)
    return [
        ImageView(grid, dense, tuple(rate[number] for rate in rates))
        for number, dense in enumerate(everything)
    ]


def meaning_of_scores(model: nn.Module) -> str:
    """Say in a few words what the scores of `model` are; ValueError if it cannot drop patches."""
    vit: Any = unwrap_model(model)
    meaning = stages_of(vit)[0].rule.score_meaning
    if meaning is not None:
        return meaning
    located = locate(vit)
    assert located is not None
    if located.family.has_class_token(located.vit):
        return "attention of the class token, mean over heads"
    return "attention of all tokens, mean over queries and heads"


def surviving_patches(kept: Sequence[Tensor], num_patches: int) -> list[Tensor]:
    """Return the patches that remain after each stage, as masks.

    Args:
        kept: for each stage, the patches it kept: int64 [B, K], -1 for an earlier stage's fused token, as in
            ``record_tokens(vit).kept``.
        num_patches: patches of the image.

    Returns:
        For each stage bool [B, num_patches].
    """
    masks = []
    for ids in kept:
        mask = torch.zeros(len(ids), num_patches + 1, dtype=torch.bool, device=ids.device)
        # A fused token's -1 is put into a column of its own, which is then cut off.
        mask.scatter_(1, ids.where(ids >= 0, num_patches), True)
        masks.append(mask[:, :num_patches])
    return masks


def _whole_grid(vit: Any, size: tuple[int, int]) -> tuple[int, int]:
    grid = patch_grid(vit, size)
    embed: Any = getattr(vit, "patch_embed", None)
    if getattr(embed, "dynamic_img_pad", False):
        side = embed.patch_size
        if size[0] % side[0] or size[1] % side[1]:
            raise ValueError(
                f"images of {size[0]}x{size[1]} pixels are padded to whole patches of {side[0]}x{side[1]}, "
                "which cannot be drawn: expected sides that are multiples of the patch's"
            )
    return grid


def _at_rate(
    model: nn.Module, images: Tensor, keep_rate: float, grid: tuple[int, int], size: tuple[int, int]
) -> list[RateView]:
    """Run the model at one keep rate; returns a view of each image."""
    vit: Any = unwrap_model(model)
    set_keep_rate(vit, keep_rate)
    with torch.inference_mode(), record_tokens(vit) as record:
        output = model(images)
    num_patches = math.prod(grid)
    plans = [record.trail.plan(stage) for stage in record.trail.stages]
    if not plans or plans[0].num_patches != num_patches:
        found = plans[0].num_patches if plans else "no"
        raise ValueError(f"expected {grid[0]}x{grid[1]} patches in the first stage, found {found}")
    probabilities = _probabilities(vit, output)
    of_model = [*(plan.scores for plan in plans), probabilities]
    if any(value is not None and value.isnan().any() for value in of_model):
        raise ValueError(f"at keep rate {keep_rate:g} the model computes NaN: are its weights finite?")
    masks = surviving_patches(record.kept, num_patches)
    groups = [_groups(record, stage) for stage in record.trail.stages]
    scores = _scores_on_grid(record, num_patches, stages_of(vit)[0].rule)
    macs = count_macs(vit, size)
    views = []
    for number in range(len(images)):
        left, stages = num_patches, []
        for stage, (mask, score) in enumerate(zip(masks, scores, strict=True)):
            now = int(mask[number].sum())
            stages.append(
                StageView(
                    mask[number].reshape(grid).cpu(),
                    score[number].reshape(grid).float().cpu(),
                    left - now,
                    plans[stage].num_made > 0,
                    None if (places := groups[stage]) is None else places[number].reshape(grid).cpu(),
                )
            )
            left = now
        of_classes = None if probabilities is None else probabilities[number]
        views.append(RateView(float(keep_rate), tuple(stages), of_classes, macs))
    return views


def _groups(record: TokenRecord, stage: int) -> Tensor | None:
    """Return which token stands for each patch after a stage, [B, patches]; None unless all were merged."""
    plans = [record.trail.plan(before) for before in record.trail.stages if before <= stage]
    merged = all(plan.represents_all and not plan.num_made for plan in plans)
    return record.trail.places(stage + 1) if merged and not all(plan.keeps_all for plan in plans) else None


def _scores_on_grid(record: TokenRecord, num_patches: int, rule: Rule) -> list[Tensor]:
    """Return for each stage the scores [B, patches], NaN where a patch did not enter it, or has no score."""
    placed = []
    for stage in record.trail.stages:
        plan = record.trail.plan(stage)
        if plan.scores is None:
            shape = (len(plan.kept), num_patches)
            placed.append(torch.full(shape, math.nan, device=plan.kept.device))
            continue
        scores = rule.shown_scores(plan.scores.float())
        patches = record.trail.patches(stage)
        if patches is not None:
            # One more column for the fused token, which is then cut off.
            everywhere = scores.new_full((len(scores), num_patches + 1), math.nan)
            scores = everywhere.scatter(1, patches.where(patches >= 0, num_patches), scores)[:, :num_patches]
        placed.append(scores)
    return placed


def _probabilities(vit: Any, output: Any) -> Tensor | None:
    """Return float32 [B, classes] on the CPU, or None where the output is not logits of classes."""
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if isinstance(output, Tensor) and not getattr(vit, "num_classes", 0):
        return None  # the output is features
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        return None
    return logits.float().softmax(dim=1).cpu()
