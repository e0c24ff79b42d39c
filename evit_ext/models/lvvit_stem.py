"""LV-ViT's stem: the convolutions that make patches of an image."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from timm.layers import PatchEmbed
from torch import Tensor, nn

from evit_ext._util.messages import shown


class ConvStem(PatchEmbed):
    """LV-ViT's patch embedding: three convolutions with batch norm and ReLU, then the projection of patches.

    The first convolution halves the image, the projection's kernel is half a patch. Input [B, channels,
    height, width]; output [B, N, C], or [B, rows, columns, C] with ``output_fmt="NHWC"``.

    Args:
        patch_size: even.
        stem_dim: channels of the three convolutions.
        others: as of timm's PatchEmbed.

    Raises:
        ValueError: `patch_size` is odd; in the forward, the image has a size that does not fit.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        stem_dim: int = 64,
        device: Any = None,
        dtype: Any = None,
        **others: Any,
    ) -> None:
        factory = {"device": device, "dtype": dtype}
        if not isinstance(patch_size, int) or patch_size < 2 or patch_size % 2:
            raise ValueError(
                "patch_size must be an even number, as LV-ViT's stem halves the image, got "
                f"{shown(patch_size)}"
            )
        super().__init__(img_size, patch_size, in_chans, embed_dim, **others)
        self.conv1 = nn.Conv2d(in_chans, stem_dim, 7, stride=2, padding=3, bias=False, **factory)
        self.bn1 = nn.BatchNorm2d(stem_dim, **factory)
        self.conv2 = nn.Conv2d(stem_dim, stem_dim, 3, padding=1, bias=False, **factory)
        self.bn2 = nn.BatchNorm2d(stem_dim, **factory)
        self.conv3 = nn.Conv2d(stem_dim, stem_dim, 3, padding=1, bias=False, **factory)
        self.bn3 = nn.BatchNorm2d(stem_dim, **factory)
        half, bias = patch_size // 2, self.proj.bias is not None
        self.proj = nn.Conv2d(stem_dim, embed_dim, half, stride=half, bias=bias, **factory)

    def set_input_size(self, img_size: Any = None, patch_size: Any = None) -> None:
        """Change the image size that the model is built for; ValueError for another patch size."""
        if patch_size is not None and patch_size not in (self.patch_size, self.patch_size[0]):
            raise ValueError(f"the patch size of LV-ViT's stem cannot be changed to {patch_size}")
        super().set_input_size(img_size=img_size)

    def forward(self, x: Tensor) -> Tensor:
        """Return the patches of images `x`."""
        height, width = x.shape[2:]
        rows, columns = self.patch_size
        if self.strict_img_size and self.img_size is not None and (height, width) != self.img_size:
            raise ValueError(
                f"the images are {height} × {width}, the model was built for {self.img_size[0]} × "
                f"{self.img_size[1]}: give img_size, or dynamic_img_size=True"
            )
        if self.dynamic_img_pad:
            x = F.pad(x, (0, -width % columns, 0, -height % rows))
        elif height % rows or width % columns:
            raise ValueError(
                f"the images are {height} × {width}, no multiple of the patch, {rows} × {columns}"
            )
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.relu(self.bn3(self.conv3(x)))
        x = self.proj(x)
        x = x.flatten(2).transpose(1, 2) if self.flatten else x.permute(0, 2, 3, 1)
        return self.norm(x)
