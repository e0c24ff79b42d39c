"""Reading one image, alike for training, evaluation and pictures; a bad image is a report, not an error.

timm's decoding would skip unreadable images with only a line in the log, ignores the camera's orientation,
turns 16-bit images white, and has no limit on their size.
"""

from __future__ import annotations

import errno
import logging
import os
import unicodedata
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import IO, NamedTuple

from PIL import Image, ImageOps, UnidentifiedImageError

_logger = logging.getLogger(__name__)

# For EPS, Pillow runs another program, Ghostscript, on an untrusted file. It only recognises the others.
_NOT_OPENED = {"EPS", "BUFR", "GRIB", "HDF5", "MPEG", "WMF"}
# Errors of the machine, not of the image: the next image would fail as well.
_MACHINE_ERRORS = {errno.EMFILE, errno.ENFILE, errno.ENOMEM}
# What was warned about in this process, each once.
_warned: set[str] = set()


class Unreadable(NamedTuple):
    """An image that could not be read: its path as printable text, and what was wrong."""

    path: str
    reason: str


class ImageLimits(NamedTuple):
    """What counts as too large to read.

    Attributes:
        max_pixels: of the image, by the size in its header, before anything is decoded; and of what is made
            of it when its shorter side is resized to `shorter_side`, as in evaluation: a strip of 5000 x 1
            pixels would become 1,280,000 x 256.
        shorter_side: in pixels; 0 for an image that is not resized.
    """

    max_pixels: int
    shorter_side: int = 0

    def check(self, size: tuple[int, int]) -> None:
        """Raise ValueError for an image of this width and height that is too large."""
        width, height = size
        if width * height > self.max_pixels:
            raise ValueError(f"{width}x{height} pixels, more than max_image_pixels {self.max_pixels}")
        short, long = min(size), max(size)
        resized = self.shorter_side * -(-self.shorter_side * long // max(short, 1))
        if self.shorter_side > short and resized > self.max_pixels:
            raise ValueError(
                f"{width}x{height} pixels: resized to a shorter side of {self.shorter_side} it would have "
                f"{resized}, more than max_image_pixels {self.max_pixels}"
            )


def printable(name: str | os.PathLike[str]) -> str:
    """Return a file's name as text that any UTF-8 file can hold, on one line.

    Bytes that are not UTF-8, such as GBK names from a Windows archive, and control characters become escapes
    (``\\xc4``). Composed and decomposed letters, which look the same, become the same (NFC).
    """
    text = os.fsencode(name).decode("utf-8", "backslashreplace")
    text = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)
    return unicodedata.normalize("NFC", text)


@cache
def endings() -> frozenset[str]:
    """Return the endings of names that are read as images, such as ``.webp``: those that Pillow opens."""
    opened = _formats()
    return frozenset(ending for ending, name in Image.registered_extensions().items() if name in opened)


def read_image(
    open_file: Callable[[], IO[bytes]], path: str, limits: ImageLimits
) -> Image.Image | Unreadable:
    """Decode an image to RGB, 8 bits a channel, the way up that its camera noted (EXIF orientation).

    Grey images of 16 bits are scaled from their whole range, black to white. Images of 32 bits (whole numbers
    or floats) have no known white and are unreadable. Transparency is dropped, as timm and torchvision do:
    the colours stored below it show. Of several frames the first is read.

    Args:
        open_file: returns the file; if it raises, the image counts as unreadable.
        path: for the report.
        limits: a larger image counts as unreadable; the size in its header is checked before it is decoded.

    Returns:
        The image, or a report of why it is unreadable.

    Raises:
        MemoryError, OSError: the machine has run out of memory or open files.
    """
    try:
        with (
            _warnings_of(path),
            open_file() as file,
            _pixel_limit(None),
            Image.open(file, formats=_formats()) as image,
        ):
            limits.check(image.size)
            # In some formats the image's size can differ from the header's, so Pillow checks again.
            with _pixel_limit(limits.max_pixels):
                ImageOps.exif_transpose(image, in_place=True)
                return _rgb(image)
    except MemoryError:
        raise
    except UnidentifiedImageError:
        return Unreadable(printable(path), "not an image that Pillow knows")
    # On damaged data, Pillow's decoders raise nearly anything, from SyntaxError to struct.error.
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _MACHINE_ERRORS:
            raise
        text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        return Unreadable(printable(path), f"{type(error).__name__}: {text}")


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        import numpy as np  # here, because commands that read no such image need none of it

        white = 65535
        bits = getattr(image, "tag_v2", {}).get(258)  # of a TIFF: 12 bits are stored in 16
        if bits and bits[0] < 16:
            white = 2 ** bits[0] - 1
        grey = np.asarray(image).astype(np.float32) * (255 / white)
        return Image.fromarray(grey.round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        kind = "whole numbers" if image.mode == "I" else "floats"
        raise ValueError(f"its pixels are {kind} of 32 bits, whose white is not known: store 8 or 16 bits")
    if "transparency" in image.info and image.mode == "P":
        image = image.convert("RGBA")  # without this step, Pillow warns
    return image.convert("RGB")


@cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in Image.ID if name not in _NOT_OPENED)


@contextmanager
def _pixel_limit(limit: int | None) -> Iterator[None]:
    """Make Pillow refuse images with more pixels than `limit`, without warnings at its own limit."""
    before = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = limit
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


@contextmanager
def _warnings_of(path: str) -> Iterator[None]:
    """Log Pillow's warnings with the file's name, each once in a process; that of the size is an error."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield
    for warning in caught:
        text = " ".join(str(warning.message).split())
        if text not in _warned:
            _warned.add(text)
            _logger.warning("%s: %s (reported once, of the first such image)", printable(path), text)
