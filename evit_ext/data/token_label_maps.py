"""LV-ViT's token labels: a map of scores for every training image, cropped and flipped along with it.

A file holds a trained network's predictions at each place of the image: a tensor [2, K, H, W], float16 as
published, of the K highest scores (logits) and their classes (K = 5; all other scores count as 0). Format and
use follow Jiang et al., "All Tokens Matter" (NeurIPS 2021, arXiv 2104.10858), after Yun et al., "Re-labeling
ImageNet" (CVPR 2021): RoIAlign resamples the crop's part of the map to the model's patch grid, then softmax.

The published code passes the crop's top and left to RoIAlign as x and y, so its labels come from the crop
mirrored in the diagonal. Here a patch gets the labels of its own place.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.ops import roi_align


class Crop(NamedTuple):
    """The part of an image that is shown, and how it is flipped and moved.

    Attributes:
        top, left, height, width: the part, as fractions of the image's height and width.
        flip: whether it is flipped left to right.
        move: (a, b, c, d, e, f) if it is then rotated, sheared or translated: point (x, y) of the view, in
            fractions of its width and height, shows point (ax + by + c, dx + ey + f) of the part.
    """

    top: float
    left: float
    height: float
    width: float
    flip: bool = False
    move: tuple[float, ...] = (1, 0, 0, 0, 1, 0)


def read_label_map(path: Path, num_classes: int) -> tuple[Tensor, Tensor]:
    """Read a file of token labels; nothing in it is executed.

    Returns:
        scores, float32 [K, H, W], and their classes, int64 [K, H, W].

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it holds something else, or a class outside [0, num_classes).
    """
    if not path.is_file():
        raise FileNotFoundError(f"there are no token labels {path}: every training image needs a file")
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # on other bytes, unpickling can raise anything
        raise ValueError(f"{path} is not a file of token labels: {type(error).__name__}: {error}") from error
    if not isinstance(stored, Tensor) or stored.dim() != 4 or stored.shape[0] != 2 or not stored.numel():
        found = list(stored.shape) if isinstance(stored, Tensor) else type(stored).__name__
        raise ValueError(f"{path} must hold a tensor [2, K, H, W], scores and classes, got {found}")
    scores, classes = stored[0].float(), stored[1].float()
    if not scores.isfinite().all():
        raise ValueError(f"{path} has scores that are not finite")
    if not ((classes >= 0) & (classes < num_classes) & (classes == classes.round())).all():
        raise ValueError(
            f"{path} must have whole numbers from 0 to {num_classes - 1} for classes, got "
            f"{classes.min().item():g} to {classes.max().item():g}"
        )
    return scores, classes.long()


def patch_labels(
    scores: Tensor,
    classes: Tensor,
    crop: Crop,
    patch_grid: tuple[int, int],
    num_classes: int,
) -> Tensor:
    """Return the class probabilities of a crop's patches.

    Args:
        scores: float32 [K, H, W], for the whole image.
        classes: int64 [K, H, W], in [0, num_classes).
        crop: the part of the image that the model sees.
        patch_grid: number of rows and columns of patches.
        num_classes: C.

    Returns:
        Probabilities, float32 [rows · columns, C], row by row.
    """
    # Few classes occur in an image; the maps of all others are 0 everywhere, and so are their crops.
    present, slots = classes.unique(return_inverse=True)
    height, width = scores.shape[1:]
    maps = scores.new_zeros(len(present), height, width).scatter_(0, slots, scores)
    box = (crop.left, crop.top, crop.left + crop.width, crop.top + crop.height)
    # Without `aligned`, RoIAlign puts 0 at the centre of the first cell; our fraction 0 is that cell's edge.
    corners = torch.tensor([box]) * torch.tensor([width, height, width, height]) - 0.5
    cut = roi_align(maps[None], [corners], patch_grid)[0]
    if crop.flip:
        cut = cut.flip(-1)
    rows, columns = _moved_patches(crop.move, patch_grid)
    cut = cut[:, rows, columns]
    # Softmax over the last dimension gives the same bits for any number of threads; workers have only one.
    logits = scores.new_zeros(patch_grid[0] * patch_grid[1], num_classes)
    logits[:, present] = cut.flatten(1).T
    return logits.softmax(dim=-1)


def _moved_patches(move: tuple[float, ...], patch_grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return which patch each patch of a moved view shows: its row and column, both int64 [rows, columns].

    This is the nearest patch, as in the published code; beyond the edge, the one at the edge.
    """
    rows, columns = patch_grid
    y = ((torch.arange(rows, dtype=torch.float64) + 0.5) / rows)[:, None]
    x = (torch.arange(columns, dtype=torch.float64) + 0.5) / columns
    a, b, c, d, e, f = move
    column = ((a * x + b * y + c) * columns).floor().long().clamp(0, columns - 1)
    row = ((d * x + e * y + f) * rows).floor().long().clamp(0, rows - 1)
    return row, column
