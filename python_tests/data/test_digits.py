"""The plain digits: what is shown, and that train and test share nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

from evit_ext.data import Digits, denormalize, normalize
from evit_ext.data.digits import load_scans


def test_splits_share_no_scan_and_lose_none() -> None:
    ink, labels = load_digits(return_X_y=True)
    everything = sorted((*row, label) for row, label in zip(ink.tolist(), labels.tolist(), strict=True))
    found = []
    for split in ("train", "test"):
        scans, targets = load_scans(split)
        pairs = zip(scans.reshape(-1, 64).tolist(), targets.tolist(), strict=True)
        found += [(*scan, label) for scan, label in pairs]
    assert sorted(found) == everything
    train = {scan.tobytes() for scan in load_scans("train")[0]}
    assert not any(scan.tobytes() in train for scan in load_scans("test")[0])


def test_test_split_has_a_fifth_of_every_class() -> None:
    train = np.bincount(load_scans("train")[1], minlength=10)
    test = np.bincount(load_scans("test")[1], minlength=10)
    assert (test == (train + test) // 5).all()


def test_scans_are_read_only() -> None:
    with pytest.raises(ValueError, match="read-only"):
        load_scans("train")[0][0, 0, 0] = 1


@pytest.mark.parametrize("split", ["train", "test"])
def test_at_its_own_size_an_image_is_the_scan(split: str) -> None:
    data = Digits(split, image_size=8)
    scans, labels = load_scans(split)
    for index in (0, 1, len(data) - 1, -1):
        image, label = data[index]
        assert image.shape == (3, 8, 8)
        assert image.dtype == torch.float32
        assert label == labels[index]
        # 17 levels of ink in 256 of gray: half a gray level of rounding.
        torch.testing.assert_close(
            denormalize(image), torch.from_numpy(scans[index] / 16), atol=0.5 / 255 + 1e-6, rtol=0
        )


def test_enlarged_bilinearly() -> None:
    image, _ = Digits("train", image_size=40)[5]
    scan = torch.from_numpy(load_scans("train")[0][5].copy())[None, None] / 16
    expected = F.interpolate(scan, size=40, mode="bilinear", align_corners=False)[0, 0]
    # Not the border: beyond the scan there is no ink here, and a repeated edge in `interpolate`.
    inner = slice(3, -3)
    # Weights are multiples of 1/64 in each direction, gray levels of 1/255.
    torch.testing.assert_close(
        denormalize(image)[inner, inner], expected[inner, inner], atol=2 / 64 + 0.5 / 255, rtol=0
    )


def test_normalize_and_back() -> None:
    canvas = np.arange(256, dtype=np.uint8).reshape(1, 16, 16)
    image = normalize(canvas)
    assert image.shape == (1, 3, 16, 16)
    assert torch.equal(image[:, 0], image[:, 2])
    torch.testing.assert_close(denormalize(image), torch.from_numpy(canvas) / 255, atol=1e-6, rtol=0)


def test_errors() -> None:
    with pytest.raises(ValueError, match="split must be one of 'train', 'test', got 'val'"):
        Digits("val")
    with pytest.raises(ValueError, match="image_size must be at least 8.*got 7"):
        Digits("train", image_size=7)
    data = Digits("test")
    assert len(list(data)) == len(data)
    for index in (len(data), -len(data) - 1):
        with pytest.raises(IndexError, match="out of range"):
            data[index]
