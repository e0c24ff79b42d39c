"""An EViT with its weights in oneDNN's layout, for measurements in other processes."""

from __future__ import annotations

import copy
from typing import Any

import torch

import evit_ext


class Prepacked(torch.nn.Module):
    """An EViT that is prepacked, in whatever process it comes to."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = evit_ext.prepack(copy.deepcopy(model))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return logits [B, classes]."""
        return self.model(images)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        evit_ext.prepack(self.model)
