"""LV-ViT's token labels: against RoIAlign and softmax written out in float64, for known crops."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from evit_ext.data.token_label_maps import Crop, patch_labels, read_label_map

CLASSES = 30


def a_map(height: int = 18, width: int = 18, topk: int = 5, seed: int = 0) -> Tensor:
    """A file's tensor, float16 [2, K, H, W]: the highest scores of random ones, and their classes."""
    generator = torch.Generator().manual_seed(seed)
    scores, classes = (4 * torch.randn(CLASSES, height, width, generator=generator)).topk(topk, dim=0)
    return torch.stack([scores, classes.float()]).half()


def slow_patch_labels(stored: Tensor, box: Crop, grid: tuple[int, int]) -> np.ndarray:
    """The same in float64, one patch and one class at a time: mean of bilinear samples, then softmax.

    RoIAlign as of He et al., "Mask R-CNN" (2017), with as many samples in a bin as it has cells, rounded up.
    """
    scores, classes = stored[0].double().numpy(), stored[1].long().numpy()
    topk, height, width = scores.shape
    dense = np.zeros((CLASSES, height, width))
    for k in range(topk):
        for y in range(height):
            for x in range(width):
                dense[classes[k, y, x], y, x] = scores[k, y, x]

    def sample(plane: np.ndarray, y: float, x: float) -> float:
        if not (-1 <= y <= height and -1 <= x <= width):
            return 0.0
        y, x = min(max(y, 0.0), height - 1.0), min(max(x, 0.0), width - 1.0)
        y0, x0 = int(y), int(x)
        y1, x1 = min(y0 + 1, height - 1), min(x0 + 1, width - 1)
        fy, fx = y - y0, x - x0
        top = plane[y0, x0] * (1 - fx) + plane[y0, x1] * fx
        bottom = plane[y1, x0] * (1 - fx) + plane[y1, x1] * fx
        return top * (1 - fy) + bottom * fy

    top, left = box.top * height - 0.5, box.left * width - 0.5
    bin_height, bin_width = box.height * height / grid[0], box.width * width / grid[1]
    down, across = math.ceil(bin_height), math.ceil(bin_width)
    result = np.zeros((*grid, CLASSES))
    for row in range(grid[0]):
        for column in range(grid[1]):
            source = grid[1] - 1 - column if box.flip else column
            logits = np.zeros(CLASSES)
            for i in range(down):
                for j in range(across):
                    y = top + (row + (i + 0.5) / down) * bin_height
                    x = left + (source + (j + 0.5) / across) * bin_width
                    logits += [sample(plane, y, x) / (down * across) for plane in dense]
            odds = np.exp(logits - logits.max())
            result[row, column] = odds / odds.sum()
    return result.reshape(-1, CLASSES)


@pytest.mark.parametrize(
    ("box", "grid"),
    [
        (Crop(0, 0, 1, 1), (18, 18)),
        (Crop(0, 0, 1, 1), (4, 4)),
        (Crop(0.1, 0.45, 0.3, 0.5, True), (7, 7)),
        (Crop(0.6, 0.05, 0.37, 0.9), (5, 3)),
        (Crop(0.9, 0.9, 0.1, 0.1, True), (2, 2)),
    ],
)
def test_patches_have_the_labels_of_their_place(box: Crop, grid: tuple[int, int]) -> None:
    stored = a_map(seed=grid[0])
    ours = patch_labels(stored[0].float(), stored[1].long(), box, grid, CLASSES)
    assert ours.dtype == torch.float32 and ours.shape == (grid[0] * grid[1], CLASSES)
    expected = slow_patch_labels(stored, box, grid)
    # Measured: at most 1.4e-6; box corners are rounded to float32.
    np.testing.assert_allclose(ours.double().numpy(), expected, atol=5e-6)
    np.testing.assert_allclose(ours.double().sum(1).numpy(), 1, atol=1e-5)


def test_a_map_that_is_not_square() -> None:
    stored, box = a_map(9, 14), Crop(0.2, 0.5, 0.6, 0.4, True)
    ours = patch_labels(stored[0].float(), stored[1].long(), box, (6, 4), CLASSES)
    np.testing.assert_allclose(ours.double().numpy(), slow_patch_labels(stored, box, (6, 4)), atol=5e-6)


def test_a_moved_view_has_the_nearest_patches() -> None:
    stored, move = a_map(), (0.9, -0.3, 0.25, 0.3, 0.9, -0.2)
    still = patch_labels(stored[0].float(), stored[1].long(), Crop(0, 0, 1, 1, True), (6, 5), CLASSES)
    moved = patch_labels(stored[0].float(), stored[1].long(), Crop(0, 0, 1, 1, True, move), (6, 5), CLASSES)
    for row in range(6):
        for column in range(5):
            x, y = (column + 0.5) / 5, (row + 0.5) / 6
            u, v = 0.9 * x - 0.3 * y + 0.25, 0.3 * x + 0.9 * y - 0.2
            source = min(max(math.floor(v * 6), 0), 5) * 5 + min(max(math.floor(u * 5), 0), 4)
            assert torch.equal(moved[row * 5 + column], still[source])


def test_the_whole_map_is_what_was_stored() -> None:
    """A patch for every cell: softmax of its scores, with 0 for the classes that are not among the top."""
    stored = a_map()
    ours = patch_labels(stored[0].float(), stored[1].long(), Crop(0, 0, 1, 1), (18, 18), CLASSES)
    dense = torch.zeros(CLASSES, 18, 18).scatter_(0, stored[1].long(), stored[0].float())
    torch.testing.assert_close(ours, dense.softmax(0).flatten(1).T, atol=1e-5, rtol=0)


def test_a_file_as_published(tmp_path: Path) -> None:
    stored = a_map()
    torch.save(stored, tmp_path / "a.pt")
    scores, classes = read_label_map(tmp_path / "a.pt", CLASSES)
    assert torch.equal(scores, stored[0].float()) and torch.equal(classes, stored[1].long())
    assert (scores.dtype, classes.dtype) == (torch.float32, torch.int64)


class _Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("harm"),))


def test_files_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.pt"
    with pytest.raises(FileNotFoundError, match=r"no token labels .*a\.pt"):
        read_label_map(path, CLASSES)
    path.write_bytes(b"no labels")
    with pytest.raises(ValueError, match=r"a\.pt is not a file of token labels"):
        read_label_map(path, CLASSES)
    monkeypatch.chdir(tmp_path)
    torch.save(_Harmful(), path)
    with pytest.raises(ValueError, match=r"a\.pt is not a file of token labels"):
        read_label_map(path, CLASSES)
    assert not (tmp_path / "harm").exists()
    bad_class, infinite = a_map(), a_map()
    bad_class[1, 0, 0, 0] = CLASSES
    infinite[0, 0, 0, 0] = math.inf
    for stored, message in (
        ({"a": a_map()}, r"a\.pt must hold a tensor \[2, K, H, W\], scores and classes, got dict"),
        (a_map()[0], r"got \[5, 18, 18\]"),
        (a_map().new_zeros(3, 5, 2, 2), r"got \[3, 5, 2, 2\]"),
        (bad_class, r"from 0 to 29 for classes, got 0 to 30"),
        (a_map().flip(0), r"must have whole numbers from 0 to 29"),
        (infinite, "not finite"),
    ):
        torch.save(stored, path)
        with pytest.raises(ValueError, match=message):
            read_label_map(path, CLASSES)
