"""timm's training transforms, together with which part of the image they show."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import AugmentOp, posterize
from torch import Tensor
from torchvision.transforms import functional

from evit_ext.data.token_label_maps import Crop

Transform = Callable[[Image.Image], Tensor]


def train_transform(**arguments: Any) -> Transform:
    """Return timm's training transform: from an image in RGB to float32 [3, S, S].

    Args:
        arguments: of `timm.data.create_transform`.
    """
    transform = create_transform(is_training=True, **arguments)
    _mend(transform.transforms)
    return transform


class CropWithLabels:
    """timm's training transform that also says which part of the image is seen.

    Given the same random numbers, the image is that of :func:`train_transform`, bit for bit.

    Args:
        arguments: of `timm.data.create_transform`.
    """

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        # In three parts: crop and flip, what changes colours, what makes a tensor.
        first, colours, last = create_transform(is_training=True, separate=True, **arguments)
        _mend(colours.transforms)
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
        for part in self.rest:
            view = part(view)
        full_width, full_height = image.size
        place = Crop(top / full_height, left / full_width, height / full_height, width / full_width, flip)
        return view, place


def _mend(transforms: list[Any]) -> None:
    """Have posterizing to 0 bits give a black image, as with the Pillow that timm was written for.

    timm's increasing policies draw it now and then (rand-m9-mstd0.5-inc1 in 2 % of cases); from Pillow 13 on
    it is a ValueError, which would end the run.
    """
    for op in _ops(transforms):
        if op.aug_fn is posterize:
            op.aug_fn = _posterize


def _ops(transforms: list[Any]) -> Iterator[AugmentOp]:
    """Yield the operations of timm's RandAugment, AutoAugment and AugMix."""
    for transform in transforms:
        policies = [getattr(transform, "ops", []), *getattr(transform, "policy", [])]
        yield from (op for policy in policies for op in policy)


def _posterize(image: Image.Image, bits: int, **more: Any) -> Image.Image:
    return posterize(image, bits, **more) if bits > 0 else Image.new(image.mode, image.size)
