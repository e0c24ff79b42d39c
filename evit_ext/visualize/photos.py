"""Photographs from files, as a model sees them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor

from evit_ext.visualize.views import ImageView


@dataclass(frozen=True)
class Photo:
    """A photograph and what a model made of it.

    Attributes:
        name: for people.
        image: RGB, as the model sees it: resized and cropped.
        view: see :class:`ImageView`.
    """

    name: str
    image: Image.Image
    view: ImageView


class Eye:
    """What shows photographs to a model: its resizing, cropping and normalising, and the way back.

    Args:
        image: as of ``timm.data.resolve_model_data_config``: input_size, mean, std, interpolation, crop_pct
            and perhaps crop_mode.

    Raises:
        ValueError: the model does not take images of three channels.
    """

    def __init__(self, image: Mapping[str, Any]) -> None:
        if image["input_size"][0] != 3:
            raise ValueError(
                f"expected a model of images in RGB, got one of {image['input_size'][0]} channels"
            )
        #: Pixels of an image's shorter side, to which it is resized.
        self.shorter_side = math.ceil(min(image["input_size"][1:]) / image["crop_pct"])
        self._transform: Callable[[Image.Image], Tensor] = create_transform(**image, is_training=False)
        self._mean, self._std = (torch.tensor(image[name]).reshape(3, 1, 1) for name in ("mean", "std"))

    def see(self, image: Image.Image) -> Tensor:
        """Return a photograph in RGB as the model takes it: float32 [3, height, width]."""
        return self._transform(image)

    def show(self, seen: Tensor) -> Image.Image:
        """Return what :meth:`see` returned as a picture: RGB, the same height and width."""
        pixels = (seen * self._std + self._mean).clamp(0, 1).mul(255).round().to(torch.uint8)
        return Image.fromarray(pixels.permute(1, 2, 0).numpy())
