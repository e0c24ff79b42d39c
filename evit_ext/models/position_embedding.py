"""Position embeddings at another image size, the way the published EViT resizes them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def resize_position_embedding(
    embedding: Tensor, grid: tuple[int, int], new_grid: tuple[int, int], num_prefix_tokens: int = 1
) -> Tensor:
    """Return `embedding` for a grid of another size or aspect ratio.

    Bicubic without antialiasing, corners not aligned: what the published EViT and DeiT do. timm's
    ``resample_abs_pos_embed`` uses antialiasing and therewith another cubic, so its values differ, also where
    the grid grows.

    Args:
        embedding: [1, P + height * width, C], floating point; the first P = `num_prefix_tokens` have no
            place in the grid and stay as they are.
        grid: height and width of the grid that `embedding` is for, in patches.
        new_grid: height and width wanted.
        num_prefix_tokens: P.

    Returns:
        [1, P + new height * new width, C], dtype of `embedding`; `embedding` itself where the grids are
        equal. Interpolated in float32, in float64 for float64. Differentiable.

    Raises:
        ValueError: `embedding` does not fit `grid` and `num_prefix_tokens`.
    """
    height, width = grid
    if embedding.dim() != 3 or embedding.shape[1] != num_prefix_tokens + height * width:
        raise ValueError(
            f"embedding must have shape [1, {num_prefix_tokens + height * width}, C] for {num_prefix_tokens} "
            f"prefix tokens and a grid of {height} × {width}, got {tuple(embedding.shape)}"
        )
    if (height, width) == tuple(new_grid):
        return embedding
    prefix, patches = embedding[:, :num_prefix_tokens], embedding[:, num_prefix_tokens:]
    image = patches.transpose(1, 2).reshape(embedding.shape[0], -1, height, width)
    if image.element_size() < 4:
        image = image.float()
    image = F.interpolate(image, size=tuple(new_grid), mode="bicubic", align_corners=False)
    return torch.cat([prefix, image.flatten(2).transpose(1, 2).to(embedding.dtype)], dim=1)
