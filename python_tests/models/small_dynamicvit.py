"""The small DynamicViT that its tests share."""

from __future__ import annotations

from typing import Any

import torch
from telling_weights import draw_telling_weights
from torch import Tensor

from evit_ext import models
from evit_ext.models.dynamicvit import DynamicViT

MICRO: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 2}


def micro(seed: int = 1, **arguments: Any) -> DynamicViT:
    """A DynamicViT of 16 patches in eval mode, with weights so large that tokens and predictors tell."""
    torch.manual_seed(seed)
    model = models.dynamicvit_tiny(**{**MICRO, "drop_loc": None, "num_classes": 5, **arguments})
    draw_telling_weights(model)
    return model.eval()


def images(height: int = 32, width: int = 32, batch: int = 3, **options: Any) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(0), **options)
