"""The small LV-ViT that its tests share."""

from __future__ import annotations

from typing import Any

import torch

from evit_ext import models
from evit_ext.models.lvvit import LVViT

MICRO: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 24,
    "depth": 4,
    "num_heads": 2,
    "stem_dim": 6,
    "num_classes": 5,
}


def micro(big: bool = True, **arguments: Any) -> LVViT:
    """A small LV-ViT of 16 patches in eval mode, with weights so large that every token tells."""
    model = models.lvvit_small(**{**MICRO, **arguments}).eval()
    if big:
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for name, tensor in model.state_dict().items():
                if name.endswith("running_var"):
                    tensor.uniform_(0.5, 1.5, generator=generator)
                elif tensor.is_floating_point():
                    tensor.normal_(std=0.3, generator=generator).add_("norm" in name and "weight" in name)
    return model


def images(
    batch: int = 3, height: int = 32, width: int = 32, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    return torch.randn(batch, 3, height, width, dtype=dtype, generator=torch.Generator().manual_seed(0))
