"""Training transforms: timm's, with the part of the image that they show."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from image_data import IMAGE, crop
from PIL import Image
from timm.data import auto_augment, create_transform

from evit_ext._util.randomness import seeded
from evit_ext.data.transforms import CropWithLabels, train_transform, view_matrix


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


@pytest.mark.parametrize("policy", ["randaug", "rand-m9-foo", "rand-q9", "v9", "augmix-x"])
def test_a_policy_that_timm_does_not_have(policy: str) -> None:
    with pytest.raises(ValueError, match=f"such as rand-m9-mstd0.5-inc1, got '{policy}'"):
        train_transform(**arguments(auto_augment=policy))


@pytest.mark.parametrize(
    "policy", ["rand-m9-mstd0.5-inc1", "rand-n3-t3a", "original-mstd0.5", "3a", "augmix-m5"]
)
def test_policies_of_timm(policy: str) -> None:
    """Each is read, and changes more than crop and flip do."""
    photograph = crop(0, 2)
    augmented, plain = train_transform(**arguments(auto_augment=policy)), train_transform(**arguments())
    different = 0
    for seed in range(8):
        images = []
        for transform in (augmented, plain):
            with seeded(seed):
                images.append(transform(photograph))
        assert images[0].shape == (3, 32, 32) and images[0].dtype == torch.float32
        different += not torch.equal(*images)
    assert different >= 4


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


@pytest.mark.parametrize("policy", ["rand-m10-inc1", "v0", "augmix-m10"])
def test_posterizing_to_no_bits_gives_black_and_no_error(policy: str) -> None:
    """Pillow 13 refuses it; all other images are timm's own."""
    ours = train_transform(**arguments(auto_augment=policy))
    theirs = create_transform(is_training=True, **arguments(auto_augment=policy))
    compared = 0
    for seed in range(40):
        with seeded(seed):
            image = ours(crop(1, 1))
        try:
            with seeded(seed):
                expected = theirs(crop(1, 1))
        except ValueError as error:
            assert "bits must be" in str(error)
            continue
        assert torch.equal(image, expected)
        compared += 1
    assert compared > 20


def test_posterizing_alone() -> None:
    plain = {"mean": (0, 0, 0), "std": (1, 1, 1), "color_jitter": None}
    transform = train_transform(**arguments(**plain, auto_augment="rand-m10-n1-inc1"))
    (policy,) = [part for part in transform.transforms if hasattr(part, "ops")]
    policy.ops = [op for op in policy.ops if op.name == "PosterizeIncreasing"]
    seen = set()
    for seed in range(20):
        with seeded(seed):
            seen.add(bool(transform(crop(1, 1)).any()))
    # Half of the time timm leaves the image as it is.
    assert seen == {False, True}


AMOUNTS = {"rotate": 25.0, "shear_x": 0.3, "shear_y": -0.25, "translate_x_abs": 9, "translate_y_abs": -6,
           "translate_x_rel": -0.2, "translate_y_rel": 0.3}  # fmt: skip


@pytest.mark.parametrize("name", AMOUNTS)
def test_moves_are_where_timm_moves_pixels(name: str) -> None:
    """An image whose pixels hold their own coordinate, moved by timm, tells where each came from."""
    function, width, height = getattr(auto_augment, name), 40, 30
    y, x = np.mgrid[0:height, 0:width] + 0.5
    expected = view_matrix(function, AMOUNTS[name], (width, height)) @ np.stack(
        [x.ravel() / width, y.ravel() / height, np.ones(x.size)]
    )
    for coordinate, side, row in ((x, width, 0), (y, height, 1)):
        picture = Image.fromarray(coordinate.astype(np.float32))
        moved = function(picture, AMOUNTS[name], resample=Image.Resampling.BILINEAR, fillcolor=-100)
        found, wanted = np.asarray(moved).ravel(), expected[row] * side
        inside = (found > 1) & (found < side - 1)
        assert inside.sum() > 300
        # Measured: 2e-3 for a rotation, whose matrix Pillow rounds.
        assert np.abs(found - wanted)[inside].max() < 0.01


def test_moves_of_a_policy_add_up() -> None:
    """Two random moves in a row: the composition is that of the whole view."""
    y, x = np.mgrid[0:64, 0:64]
    picture = Image.fromarray(np.stack([4 * x, 4 * y, 0 * x], axis=-1).astype(np.uint8))
    plain = {"mean": (0, 0, 0), "std": (1, 1, 1), "color_jitter": None, "hflip": 0.0, "scale": (1.0, 1.0)}
    transform = CropWithLabels(
        arguments(**plain, input_size=(3, 64, 64), ratio=(1.0, 1.0), auto_augment="rand-m9-n3-inc1")
    )
    names = {"rotate", "shear_x", "shear_y", "translate_x_rel", "translate_y_rel"}
    (policy,) = transform.rest[0].transforms
    functions = [getattr(auto_augment, name) for name in names]
    policy.ops = [op for op in policy.ops if getattr(op.aug_fn, "args", [0])[0] in functions]
    assert len(policy.ops) == 5
    for seed in range(10):
        with seeded(seed):
            view, crop_ = transform(picture)
        assert crop_[:5] == (0, 0, 1, 1, False)
        a, b, c, d, e, f = crop_.move
        checked = 0
        for row in range(4, 64, 8):
            for column in range(4, 64, 8):
                u, v = (column + 0.5) / 64, (row + 0.5) / 64
                source = 64 * (a * u + b * v + c) - 0.5, 64 * (d * u + e * v + f) - 0.5
                if all(6 < place < 57 for place in source):
                    found = view[:2, row, column] * 255 / 4
                    if not found.any():  # the first of the moves brought it in from beyond the edge
                        continue
                    # Colours are whole numbers of quarters of a pixel, rounded three times.
                    assert found.tolist() == pytest.approx(source, abs=1.5)
                    checked += 1
        assert checked > 3
    with pytest.raises(ValueError, match="cannot follow auto_augment augmix"):
        CropWithLabels(arguments(auto_augment="augmix-m5"))
