"""timm's training transforms, optionally reporting which part of the image they show."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from timm.data import auto_augment, create_transform
from torch import Tensor
from torchvision.transforms import functional

from evit_ext._util.messages import shown
from evit_ext.data.token_label_maps import Crop

Transform = Callable[[Image.Image], Tensor]
Matrix = npt.NDArray[np.float64]


def train_transform(**arguments: Any) -> Transform:
    """Return timm's training transform: from an RGB image to float32 [3, S, S].

    Args:
        arguments: of `timm.data.create_transform`.

    Raises:
        ValueError: auto_augment is not one of timm's policies.
    """
    transform = _create(arguments)
    _mend(transform.transforms)
    return transform


class CropWithLabels:
    """timm's training transform that also returns which part of the image is shown.

    With the same random numbers, the image equals that of :func:`train_transform`, bit for bit. Rotations,
    shears and translations by auto_augment are included in the returned crop.

    Args:
        arguments: of `timm.data.create_transform`.

    Raises:
        ValueError: auto_augment is not one of timm's policies, or is AugMix, which blends several views.
    """

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        if (arguments.get("auto_augment") or "").startswith("augmix"):
            raise ValueError("token labels cannot follow auto_augment augmix: it blends several views")
        # In three parts: crop and flip, auto_augment or colour jitter, conversion to a tensor.
        first, colours, last = _create({**arguments, "separate": True})
        _mend(colours.transforms)
        for op in _ops(colours.transforms):
            if op.aug_fn in MOVES:
                op.aug_fn = partial(self._move, op.aug_fn)
        self.moves: list[Matrix] = []
        self.crop = first.transforms[0]
        self.rest = (colours, last)
        self.hflip: float = arguments["hflip"]

    def __call__(self, image: Image.Image) -> tuple[Tensor, Crop]:
        """Return the augmented image, float32 [3, S, S], and its crop."""
        crop = self.crop
        top, left, height, width = crop.get_params(image, crop.scale, crop.ratio)
        choices = crop.interpolation
        interpolation = random.choice(choices) if isinstance(choices, tuple) else choices
        view = functional.resized_crop(image, top, left, height, width, crop.size, interpolation)
        flip = self.hflip > 0 and bool(torch.rand(1) < self.hflip)
        if flip:
            view = functional.hflip(view)
        self.moves.clear()
        for part in self.rest:
            view = part(view)
        move = np.eye(3)
        for matrix in self.moves:
            move = move @ matrix
        full_width, full_height = image.size
        box = (top / full_height, left / full_width, height / full_height, width / full_width)
        return view, Crop(*box, flip, tuple(move[:2].flatten().tolist()))

    def _move(
        self, function: Callable[..., Image.Image], image: Image.Image, amount: float, **more: Any
    ) -> Image.Image:
        self.moves.append(view_matrix(function, amount, image.size))
        return function(image, amount, **more)


def view_matrix(function: Callable[..., Image.Image], amount: float, size: tuple[int, int]) -> Matrix:
    """Return the map from points of a moved view to the original one, both in fractions of width and height.

    Args:
        function: of `timm.data.auto_augment`, one of `MOVES`.
        amount: the argument of `function`.
        size: width and height in pixels.

    Returns:
        float64 [3, 3], for homogeneous coordinates (x, y, 1).
    """
    pixels = np.diag([*size, 1.0])
    return np.linalg.inv(pixels) @ MOVES[function](amount, *size) @ pixels


def _affine(a: float, b: float, c: float, d: float, e: float, f: float) -> Matrix:
    return np.array([[a, b, c], [d, e, f], [0, 0, 1]], dtype=np.float64)


def _rotation(degrees: float, width: int, height: int) -> Matrix:
    cosine, sine = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    to_middle = _affine(1, 0, -width / 2, 0, 1, -height / 2)
    return np.linalg.inv(to_middle) @ _affine(cosine, -sine, 0, sine, cosine, 0) @ to_middle


#: The maps of timm's functions in pixel coordinates, given their argument and the image's width and height.
MOVES: dict[Callable[..., Image.Image], Callable[[float, int, int], Matrix]] = {
    auto_augment.rotate: _rotation,
    auto_augment.shear_x: lambda factor, width, height: _affine(1, factor, 0, 0, 1, 0),
    auto_augment.shear_y: lambda factor, width, height: _affine(1, 0, 0, factor, 1, 0),
    auto_augment.translate_x_abs: lambda by, width, height: _affine(1, 0, by, 0, 1, 0),
    auto_augment.translate_y_abs: lambda by, width, height: _affine(1, 0, 0, 0, 1, by),
    auto_augment.translate_x_rel: lambda share, width, height: _affine(1, 0, share * width, 0, 1, 0),
    auto_augment.translate_y_rel: lambda share, width, height: _affine(1, 0, 0, 0, 1, share * height),
}


def _create(arguments: Mapping[str, Any]) -> Any:
    policy: str | None = arguments.get("auto_augment")
    if policy:
        name, *sections = policy.split("-")
        # timm ignores sections without a number, except RandAugment's t sections, which name its operations.
        known = all(re.search(r"\d", part) or (name == "rand" and part[:1] == "t") for part in sections)
        problem = (
            f"auto_augment must be timm's name of a policy, such as rand-m9-mstd0.5-inc1, got {shown(policy)}"
        )
        if not known:
            raise ValueError(problem)
        try:
            create_transform(arguments["input_size"], is_training=True, auto_augment=policy)
        # What timm raises for an unknown policy, the first often without a message.
        except (AssertionError, KeyError, ValueError) as error:
            raise ValueError(problem) from error
    return create_transform(is_training=True, **arguments)


def _mend(transforms: list[Any]) -> None:
    """Make posterizing to 0 bits give a black image, as in the Pillow versions that timm was written for.

    timm's increasing policies sometimes draw 0 bits (rand-m9-mstd0.5-inc1 in 2 % of cases). From Pillow 13 on
    that is a ValueError, which would end the run.
    """
    for op in _ops(transforms):
        if op.aug_fn is auto_augment.posterize:
            op.aug_fn = _posterize


def _ops(transforms: list[Any]) -> Iterator[auto_augment.AugmentOp]:
    """Yield the operations of timm's RandAugment, AutoAugment and AugMix."""
    for transform in transforms:
        policies = [getattr(transform, "ops", []), *getattr(transform, "policy", [])]
        yield from (op for policy in policies for op in policy)


def _posterize(image: Image.Image, bits: int, **more: Any) -> Image.Image:
    return auto_augment.posterize(image, bits, **more) if bits > 0 else Image.new(image.mode, image.size)
