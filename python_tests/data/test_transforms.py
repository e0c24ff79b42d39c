"""Training transforms: timm's, with the part of the image that they show."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from image_data import IMAGE, crop
from PIL import Image
from timm.data import create_transform

from evit_ext.data.transforms import CropWithLabels, train_transform
from evit_ext.randomness import seeded


def arguments(**more: Any) -> dict[str, Any]:
    image = {name: IMAGE[name] for name in ("input_size", "mean", "std")}
    return {**image, "hflip": 0.5, "interpolation": "random", **more}


@pytest.mark.parametrize(
    "more",
    [{}, {"hflip": 0.0}, {"auto_augment": "rand-m9-mstd0.5-inc1", "re_prob": 0.5, "re_mode": "pixel"}],
)
def test_the_image_is_that_of_timm(more: dict[str, Any]) -> None:
    photograph = crop(0, 2)
    ours, theirs = CropWithLabels(arguments(**more)), train_transform(**arguments(**more))
    for seed in range(20):
        with seeded(seed):
            image, _ = ours(photograph)
        with seeded(seed):
            assert torch.equal(image, theirs(photograph))


def test_the_crop_is_the_part_that_is_seen() -> None:
    """An image whose colours are its coordinates tells which part of it a view shows."""
    height, width = 90, 120
    y, x = np.mgrid[0:height, 0:width]
    picture = np.stack([2 * y, 2 * x, 0 * x], axis=-1).astype(np.uint8)
    plain = {"mean": (0, 0, 0), "std": (1, 1, 1), "color_jitter": None, "interpolation": "bilinear"}
    transform = CropWithLabels(arguments(**plain))
    flips = set()
    for seed in range(30):
        with seeded(seed):
            view, box = transform(Image.fromarray(picture))
        rows, columns = view[0].mean(1).double() * 255 / 2, view[1].mean(0).double() * 255 / 2
        flips.add(box.flip)
        assert bool(columns[0] > columns[-1]) == box.flip
        # The middle of the view is that of the crop, whatever the filter does at its edges.
        middle = (rows[15:17].mean().item() + 0.5) / height, (columns[15:17].mean().item() + 0.5) / width
        assert middle[0] == pytest.approx(box.top + box.height / 2, abs=0.01)
        assert middle[1] == pytest.approx(box.left + box.width / 2, abs=0.01)
        steps = (rows[20] - rows[12]).item() / 8, abs(columns[20] - columns[12]).item() / 8
        assert steps[0] * 32 == pytest.approx(box.height * height, rel=0.1)
        assert steps[1] * 32 == pytest.approx(box.width * width, rel=0.1)
    assert flips == {True, False}


@pytest.mark.parametrize("policy", ["rand-m10-inc1", "rand-m9-mstd0.5-inc1", "v0", "augmix-m10"])
def test_posterizing_to_no_bits_is_no_error(policy: str) -> None:
    """Pillow 13 refuses it; the image is black, and all others are timm's own."""
    ours = train_transform(**arguments(auto_augment=policy))
    theirs = create_transform(is_training=True, **arguments(auto_augment=policy))
    refused = 0
    for seed in range(80):
        with seeded(seed):
            image = ours(crop(1, 1))
        try:
            with seeded(seed):
                assert torch.equal(image, theirs(crop(1, 1)))
        except ValueError as error:
            assert "bits must be" in str(error)
            refused += 1
    assert refused < 80
