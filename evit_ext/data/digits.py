"""Real handwritten digits without a download: the 1,797 scans that come with scikit-learn.

Source: E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning
Repository; 8x8 pixels with ink from 0 to 16. One fifth of every class is the test split; no scan is in both.
"""

from __future__ import annotations

from functools import cache
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset

from evit_ext._util.messages import shown

SCAN_SIZE = 8
INK_MAX = 16
SPLITS = ("train", "test")

# Every image is normalized with these, roughly the mean and standard deviation of the hard cluttered digits
# (0.14 and 0.24; the easy ones have 0.08 and 0.17, the plain digits 0.30 and 0.32). All data sets share them,
# so that a network trained on one can be evaluated on another.
MEAN = 0.15
STD = 0.25

# Interpolation weights are multiples of 1 / WEIGHT_ONE. A canvas is then a sum of small integers, exact in
# float32 in any order of summation, so an image has the same bits on every machine and in every batch.
WEIGHT_ONE = 64

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]
ByteArray = npt.NDArray[np.uint8]


def check_split(split: str) -> None:
    """Raise ValueError unless `split` is "train" or "test"."""
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(map(repr, SPLITS))}, got {shown(split)}")


@cache
def load_scans(split: str) -> tuple[FloatArray, IntArray]:
    """The scans of a split.

    Args:
        split: "train" (1,442 scans) or "test" (355 scans).

    Returns:
        ink, float32 [n, 8, 8] with whole numbers from 0 to 16, and labels, int64 [n]. Both are read-only and
        shared between callers.

    Raises:
        ValueError: unknown split.
        ModuleNotFoundError: scikit-learn is not installed.
    """
    check_split(split)
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ModuleNotFoundError(
            'the digits data sets need scikit-learn: pip install "evit_ext[demo]"'
        ) from error
    ink, labels = load_digits(return_X_y=True)
    # Every fifth scan of a class, in the published order: balanced and free of any random generator.
    rank = np.empty(len(labels), dtype=np.int64)
    for digit in range(10):
        members = np.flatnonzero(labels == digit)
        rank[members] = np.arange(len(members))
    chosen = (rank % 5 == 4) == (split == "test")
    scans = np.ascontiguousarray(ink[chosen].reshape(-1, SCAN_SIZE, SCAN_SIZE), dtype=np.float32)
    targets = np.ascontiguousarray(labels[chosen], dtype=np.int64)
    scans.setflags(write=False)
    targets.setflags(write=False)
    return scans, targets


def interpolation_weights(
    length: int,
    start: npt.NDArray[np.generic],
    extent: npt.NDArray[np.generic],
    first: npt.NDArray[np.generic],
) -> FloatArray:
    """Weights that draw a row of scan pixels onto a row of canvas pixels, bilinearly.

    Args:
        length: number of canvas pixels.
        start: [...] canvas pixel at which scan pixel `first` begins.
        extent: [...] number of canvas pixels that a whole scan (8 pixels) would cover.
        first: [...] the scan pixel drawn at `start`.

    Returns:
        float32 [..., length, 8], whole numbers from 0 to `WEIGHT_ONE`.
    """
    pixel = np.arange(length, dtype=np.float32) + np.float32(0.5)
    pitch = np.float32(SCAN_SIZE) / extent.astype(np.float32)
    position = (pixel - start.astype(np.float32)[..., None]) * pitch[..., None]
    position += (first.astype(np.float32) - np.float32(0.5))[..., None]
    distance = np.abs(position[..., None] - np.arange(SCAN_SIZE, dtype=np.float32))
    return np.rint(np.float32(WEIGHT_ONE) * np.maximum(np.float32(1) - distance, np.float32(0)))


def normalize(canvas: ByteArray) -> torch.Tensor:
    """uint8 [..., S, S] -> float32 [..., 3, S, S]: to [0, 1], minus `MEAN`, over `STD`; gray repeated."""
    gray = torch.from_numpy(canvas).float().div_(255).sub_(MEAN).div_(STD)
    return gray.unsqueeze(-3).expand(*gray.shape[:-2], 3, *gray.shape[-2:]).contiguous()


def denormalize(image: torch.Tensor) -> torch.Tensor:
    """float [..., 3, S, S] -> [..., S, S] in [0, 1]: undo `normalize`, to show pictures."""
    return image.select(-3, 0).mul(STD).add(MEAN).clamp(0, 1)


class Digits(Dataset[tuple[torch.Tensor, int]]):
    """The plain scans, enlarged.

    Args:
        split: "train" or "test"; their scans are disjoint.
        image_size: side of the square image in pixels, at least 8.

    Items are `(image, label)`: float32 [3, image_size, image_size], normalized, and an int from 0 to 9.

    Raises:
        ValueError: unknown split, or `image_size` below 8.
        ModuleNotFoundError: scikit-learn is not installed.
    """

    num_classes = 10

    def __init__(self, split: str = "train", image_size: int = 32) -> None:
        check_split(split)
        if image_size < SCAN_SIZE:
            raise ValueError(f"image_size must be at least {SCAN_SIZE}, the size of a scan, got {image_size}")
        self.split = split
        self.image_size = image_size
        self.scans, self.labels = load_scans(split)
        zero = np.zeros((), dtype=np.int64)
        self._weights = interpolation_weights(image_size, zero, zero + image_size, zero)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} items")
        drawn = self._weights @ self.scans[index] @ self._weights.T
        canvas = np.rint(drawn * np.float32(255 / (INK_MAX * WEIGHT_ONE**2))).astype(np.uint8)
        return normalize(canvas), int(cast(int, self.labels[index]))
