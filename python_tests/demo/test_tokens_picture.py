"""tokens.png: dark where a patch is left, light where it is not, outlined where the digit is."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from evit_ext.demo.tokens_picture import Column, _outline, save_tokens_picture


def draw(path: Path, survivors: list[torch.Tensor]) -> np.ndarray:
    images = len(survivors[0])
    objects = torch.zeros(images, 16, dtype=torch.bool)
    objects[:, 5] = True
    column = Column("EViT, keep rate 0.5", survivors, [0.9] * len(survivors), torch.arange(images))
    save_tokens_picture(path, torch.zeros(images, 32, 32), torch.zeros(images).long(), objects, [column])
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("L"), dtype=np.int64)


def test_more_patches_left_more_dark(tmp_path: Path) -> None:
    nothing, half, everything = torch.zeros(2, 16), torch.arange(16).repeat(2, 1) % 2, torch.ones(2, 16)
    dark = []
    for first in (nothing, half, everything):
        pixels = draw(tmp_path / "tokens.png", [first.bool(), nothing.bool()])
        dark.append(int((pixels < 60).sum()))
    # Of equal steps: half the patches of one column of pictures, outlines and numbers aside.
    assert dark[1] - dark[0] == pytest.approx(dark[2] - dark[1], rel=0.05)
    # The inputs are dark throughout, and the full column adds as much again.
    assert dark[2] / dark[0] == pytest.approx(2, rel=0.1)


@pytest.mark.parametrize(("patch", "row", "column"), [(0, 0, 0), (3, 0, 3), (12, 3, 0), (6, 1, 2)])
def test_a_dropped_patch_is_light_where_it_lies(tmp_path: Path, patch: int, row: int, column: int) -> None:
    nothing, everything = torch.zeros(1, 16, dtype=torch.bool), torch.ones(1, 16, dtype=torch.bool)
    dropped = everything.clone()
    dropped[0, patch] = False
    full, empty, one = (draw(tmp_path / "tokens.png", [left]) for left in (everything, nothing, dropped))
    # The stage's picture is where a full one and an empty one differ most; headings differ by some strokes.
    differs = abs(full - empty) > 100
    rows = (differs.sum(axis=1) > differs.sum(axis=1).max() / 2).nonzero()[0]
    columns = (differs.sum(axis=0) > differs.sum(axis=0).max() / 2).nonzero()[0]
    # Nothing changes in the input's picture, which is the left one.
    assert columns.min() > full.shape[1] // 3
    picture = slice(rows.min(), rows.max() + 1), slice(columns.min(), columns.max() + 1)
    light = (one > 200)[picture]
    height, width = light.shape
    # The number in the corner has some light pixels too; a patch is a quarter of the picture wide.
    where = light.nonzero()
    assert where[0].mean() / height == pytest.approx((row + 0.5) / 4, abs=0.06)
    assert where[1].mean() / width == pytest.approx((column + 0.5) / 4, abs=0.06)
    assert light.mean() == pytest.approx(1 / 16, abs=0.02)


def test_outline() -> None:
    one = np.zeros((3, 3), dtype=bool)
    one[1, 2] = True
    assert sorted(_outline(one)) == sorted(
        [((2, 3), (1, 1)), ((2, 3), (2, 2)), ((2, 2), (1, 2)), ((3, 3), (1, 2))]
    )
    assert len(_outline(np.ones((3, 3), dtype=bool))) == 12
    assert _outline(np.zeros((3, 3), dtype=bool)) == []


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "evit_ext\[demo\]"'):
        draw(tmp_path / "tokens.png", [torch.ones(1, 16, dtype=torch.bool)])
