"""MixToken: exchange of a box of patches between the images of a batch (Jiang et al., NeurIPS 2021)."""

from __future__ import annotations

import torch
from torch import Tensor


def draw_exchanged(rows: int, columns: int, device: torch.device | None = None) -> Tensor:
    """Draw which patches MixToken exchanges: a box, drawn as the published code does, but by torch.

    With λ ~ Beta(1, 1), which is uniform, the box has the size of the grid times √(1 − λ), lies at a uniform
    place, and is cut off at the grid's edge.

    Args:
        rows: of the grid of patches.
        columns: of the grid.
        device: where to draw; nothing waits for it.

    Returns:
        bool [rows · columns].
    """
    side = (1 - torch.rand((), device=device)).sqrt()
    inside = []
    for length in (rows, columns):
        half = (side * length).long() // 2
        centre = torch.randint(length, (), device=device)
        place = torch.arange(length, device=device)
        inside.append((place >= centre - half) & (place < centre + half))
    return (inside[0].unsqueeze(1) & inside[1]).flatten()
