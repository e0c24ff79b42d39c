"""Photographs from files, as a model sees them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageOps
from timm.data import create_transform
from torch import Tensor

from evit_ext.data.images import Unreadable, read_image
from evit_ext.visualize.views import ImageView

_ENDINGS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})


class Found(NamedTuple):
    """The image files that paths stand for, and how many files of folders are none by their names."""

    files: list[Path]
    others: int


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


def shown_name(file: Path) -> str:
    """Return a file's name for people; bytes that are no UTF-8 as replacement characters."""
    return os.fsencode(file.name).decode("utf-8", "replace")


def find_photos(paths: Sequence[str | Path]) -> Found:
    """Return the files that `paths` stand for: files as they are, of folders their image files by name.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: a folder has no image files.
    """
    files: list[Path] = []
    others = 0
    for path in map(Path, paths):
        if path.is_dir():
            entries = sorted(entry for entry in path.iterdir() if entry.is_file())
            images = [entry for entry in entries if entry.suffix.lower() in _ENDINGS]
            if not images:
                raise ValueError(
                    f"the folder {path} has no image files: expected {' '.join(sorted(_ENDINGS))}"
                )
            files += images
            others += len(entries) - len(images)
        elif path.exists():
            files.append(path)
        else:
            raise FileNotFoundError(f"there is no file or folder {path}")
    return Found(files, others)


def read_photo(path: Path, max_pixels: int) -> Image.Image | Unreadable:
    """Return a photograph in RGB, the way up that its camera noted, or why it could not be read.

    Args:
        path: of the file.
        max_pixels: a larger image counts as unreadable, and is not decoded.
    """
    image = read_image(lambda: path.open("rb"), str(path), max_pixels)
    if isinstance(image, Unreadable):
        return image
    try:
        return ImageOps.exif_transpose(image)
    except Exception as error:  # Pillow's readers raise nearly anything on damaged data
        return Unreadable(str(path), f"its orientation cannot be read: {type(error).__name__}: {error}")


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
        self._transform: Callable[[Image.Image], Tensor] = create_transform(**image, is_training=False)
        self._mean, self._std = (torch.tensor(image[name]).reshape(3, 1, 1) for name in ("mean", "std"))

    def see(self, image: Image.Image) -> Tensor:
        """Return a photograph in RGB as the model takes it: float32 [3, height, width]."""
        return self._transform(image)

    def show(self, seen: Tensor) -> Image.Image:
        """Return what :meth:`see` returned as a picture: RGB, the same height and width."""
        pixels = (seen * self._std + self._mean).clamp(0, 1).mul(255).round().to(torch.uint8)
        return Image.fromarray(pixels.permute(1, 2, 0).numpy())
