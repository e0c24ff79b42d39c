"""The convolution that makes tokens of patches, on the CPU without gradients, as a product.

Its patches do not overlap, so it is a linear layer of their pixels. As a convolution it takes oneDNN 1.1 to 2
times as long, with the copy of the tokens after it (DeiT-S and ViT-B, batch 1 to 16, two cores of AMD's Zen
4, in turns).
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from evit_ext.cpu import packed_weights
from evit_ext.cpu.forward import fit, may_replace, multiplies, product, remember

remember(nn.Conv2d)

#: What nn.Conv2d calls, which other code may have replaced.
_CONV2D = F.conv2d


def patch_projections(vit: nn.Module) -> list[nn.Module]:
    """Return the convolutions in `vit` whose windows lie side by side."""
    return [module for module in vit.modules() if type(module) is nn.Conv2d and _is_of_patches(module)]


def _is_of_patches(convolution: nn.Conv2d) -> bool:
    alone = convolution.padding in (0, (0, 0), "valid") and convolution.groups == 1
    side_by_side = convolution.kernel_size == convolution.stride and convolution.dilation == (1, 1)
    return alone and side_by_side and convolution.kernel_size != (1, 1)


def patch_projection_forward(convolution: Any, images: Tensor) -> Tensor:
    """Return the projections [B, C, height, width] of the patches of `images` [B, channels, H, W].

    Their channels are last in memory, as tokens have them.
    """
    found = None
    if may_replace(convolution, images) and F.conv2d is _CONV2D and multiplies(images):
        weight, bias = convolution._parameters["weight"], convolution._parameters["bias"]
        plain = type(weight) is nn.Parameter and weight.is_contiguous() and _is_of_patches(convolution)
        flat = weight.flatten(1) if plain and images.dim() == 4 else None
        if flat is not None and fit(flat, bias, images):
            found = packed_weights.weight_of(convolution, flat), bias
    if found is None:
        out: Tensor = nn.Conv2d.forward(convolution, images)
        return out
    height, width = convolution.kernel_size
    rows, columns = images.shape[2] // height, images.shape[3] // width
    patches = images[:, :, : rows * height, : columns * width]  # what is left over is not convolved either
    patches = patches.unflatten(3, (columns, width)).unflatten(2, (rows, height)).permute(0, 2, 4, 1, 3, 5)
    tokens = product(patches.reshape(len(images), rows * columns, -1), found)
    return tokens.view(len(images), rows, columns, -1).permute(0, 3, 1, 2)
