"""The convolution that makes tokens of patches, on the CPU without gradients, as a product.

Its patches do not overlap, so it is a linear layer of their pixels. As a convolution it takes oneDNN 1.1 to 2
times as long, with the copy of the tokens after it (DeiT-S and ViT-B, batch 1 to 16, two cores of AMD's Zen
4, in turns).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evit_ext.cpu import packed_weights
from evit_ext.cpu.forward import fit, may_replace, multiplies, product, remember

remember(nn.Conv2d)

#: What nn.Conv2d calls, which other code may replace.
_CONV2D, _CONV_FORWARD = torch.conv2d, nn.Conv2d._conv_forward


def patch_projections(vit: nn.Module) -> list[nn.Module]:
    """Return the convolutions in `vit` whose windows lie side by side."""
    return [module for module in vit.modules() if type(module) is nn.Conv2d and _is_of_patches(module)]


def _is_of_patches(convolution: nn.Conv2d) -> bool:
    alone = convolution.padding in (0, (0, 0), "valid") and convolution.groups == 1
    side_by_side = convolution.kernel_size == convolution.stride and convolution.dilation == (1, 1)
    return alone and side_by_side and convolution.kernel_size != (1, 1)


def _is_as_written(convolution: Any) -> bool:
    own = "_conv_forward" not in convolution.__dict__ and nn.Conv2d._conv_forward is _CONV_FORWARD
    return own and F.conv2d is _CONV2D and _is_of_patches(convolution)


def _fits(convolution: Any, weight: Any, bias: Any, images: Tensor) -> bool:
    """Return whether weight and images have the sizes that they should have, and one patch at least."""
    # It is an attribute of another kind under pruning, and the bias with it may be.
    if type(weight) is not nn.Parameter or not weight.is_contiguous() or bias is not convolution.bias:
        return False
    height, width = convolution.kernel_size
    if images.dim() != 4 or weight.shape[1:] != (images.shape[1], height, width):
        return False
    return images.shape[2] >= height and images.shape[3] >= width


def patch_projection_forward(convolution: Any, images: Tensor) -> Tensor:
    """Return the projections [B, C, height, width] of the patches of `images` [B, channels, H, W].

    Their channels are last in memory, as tokens have them.
    """
    found = None
    if may_replace(convolution, images) and multiplies(images) and _is_as_written(convolution):
        weight, bias = convolution._parameters.get("weight"), convolution._parameters.get("bias")
        if _fits(convolution, weight, bias, images):
            flat = weight.flatten(1)
            found = (packed_weights.weight_of(convolution, flat), bias) if fit(flat, bias, images) else None
    if found is None:
        out: Tensor = type(convolution).forward(convolution, images)
        return out
    height, width = convolution.kernel_size
    rows, columns = images.shape[2] // height, images.shape[3] // width
    patches = images[:, :, : rows * height, : columns * width]  # what is left over is not convolved either
    patches = patches.unflatten(3, (columns, width)).unflatten(2, (rows, height)).permute(0, 2, 4, 1, 3, 5)
    tokens = product(patches.reshape(len(images), rows * columns, -1), found)
    return tokens.view(len(images), rows, columns, -1).permute(0, 3, 1, 2)
