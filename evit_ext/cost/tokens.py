"""How many patch tokens are left after each stage, from settings and sizes alone: nothing is run."""

from __future__ import annotations

from timm.utils.model import unwrap_model
from torch import nn

from evit_ext.patching.families import locate
from evit_ext.tokens.stage import find_stages


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
    stages = find_stages(model)
    if not stages:
        return []
    rows, columns = patch_grid(unwrap_model(model), img_size)
    counts = [rows * columns]
    for stage in stages:
        counts.append(stage.rule.num_out(counts[-1], counts[0]))
    return counts


def patch_grid(vit: nn.Module, img_size: tuple[int, int]) -> tuple[int, int]:
    """Return the rows and columns of the patches that `vit` makes of an image of (height, width)."""
    located = locate(vit)
    assert located is not None
    return located.family.patch_grid(located.vit, img_size)
