"""How many patch tokens are left after each stage, from settings and sizes alone: nothing is run."""

from __future__ import annotations

from typing import Any

from timm.utils.model import unwrap_model
from torch import nn

from evit_ext.patching.families import reorganizing_blocks, vision_tower


def count_tokens(model: nn.Module, img_size: tuple[int, int]) -> list[int]:
    """Return how many patch tokens enter the first block of `model`, and how many leave each stage.

    A stage is a reorganising block, or a predictor of a DynamicViT. A fused token counts as one: it costs
    what any other costs. In eval mode, in which a DynamicViT drops tokens and nothing else does.

    Args:
        model: wrapped (DistributedDataParallel, torch.compile) or not.
        img_size: height and width of the images in pixels.

    Returns:
        The counts, in order; of a model that drops no token, none.
    """
    vit: Any = unwrap_model(model)
    if hasattr(vit, "score_predictor"):
        patches = _num_patches(vit, img_size)
        return [patches, *(vit.num_keep(stage, patches) for stage in range(len(vit.stages())))]
    blocks = reorganizing_blocks(vit)
    if not blocks:
        return []
    counts = [_num_patches(vit, img_size)]
    for block in blocks:
        num_keep = block.num_keep(counts[-1])
        counts.append(num_keep + block.fuse_token if num_keep < counts[-1] else counts[-1])
    return counts


def patch_grid(vit: Any, img_size: tuple[int, int]) -> tuple[int, int]:
    """Return the rows and columns of the patches that `vit` makes of an image of (height, width)."""
    if hasattr(vit, "patch_embed"):
        rows, columns = vit.patch_embed.dynamic_feat_size(img_size)
    else:  # of transformers
        side = vision_tower(vit).config.patch_size
        rows, columns = img_size[0] // side, img_size[1] // side
    return int(rows), int(columns)


def _num_patches(vit: Any, img_size: tuple[int, int]) -> int:
    rows, columns = patch_grid(vit, img_size)
    return rows * columns
