"""Reading an image: limits, modes, orientation, and bad files as reports."""

from __future__ import annotations

import errno
import io

import numpy as np
import pytest
from image_data import crop, encoded, huge_png
from PIL import Image

from evit_ext.data.images import ImageLimits, Unreadable, read_image

LIMITS = ImageLimits(89_478_485)


def test_the_size_is_looked_at_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a limit of our own, below and above Pillow's."""
    image = Image.new("L", (30, 20))
    file = io.BytesIO()
    image.save(file, "PNG")

    def read(data: bytes, limit: int) -> Image.Image | Unreadable:
        return read_image(lambda: io.BytesIO(data), "x.png", ImageLimits(limit))

    assert isinstance(read(file.getvalue(), 600), Image.Image)
    report = read(file.getvalue(), 599)
    assert report == Unreadable("x.png", "ValueError: 30x20 pixels, more than max_image_pixels 599")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert isinstance(read(file.getvalue(), 600), Image.Image)
    assert Image.MAX_IMAGE_PIXELS == 100

    def decode(*_: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decode)
    assert "100000x100000" in read(huge_png(), LIMITS.max_pixels).reason  # type: ignore[union-attr]


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_other_modes_become_rgb(mode: str) -> None:
    file = io.BytesIO()
    crop(0, 1).convert(mode).save(file, "TIFF")
    image = read_image(lambda: io.BytesIO(file.getvalue()), "x.tif", LIMITS)
    assert isinstance(image, Image.Image) and image.mode == "RGB"


def test_no_other_program_is_run_for_an_image() -> None:
    """An EPS file, whatever its name ends in, is a program, for which Pillow would start Ghostscript."""
    file = io.BytesIO()
    crop(0, 1).save(file, "EPS")
    assert read_image(lambda: file, "x.jpg", LIMITS) == Unreadable("x.jpg", "not an image that Pillow knows")


def test_every_cut_of_a_file_is_a_report_or_an_image() -> None:
    """Whatever Pillow raises on damaged data; bytes changed in the middle, too."""
    whole = encoded(0, 3)
    generator = np.random.default_rng(0)
    kinds = set()
    for _ in range(60):
        data = bytearray(whole[: generator.integers(len(whole))] if generator.random() < 0.5 else whole)
        for place in generator.integers(0, max(len(data), 1), 5):
            if data:
                data[place] = generator.integers(256)
        kinds.add(type(read_image(lambda data=data: io.BytesIO(bytes(data)), "x", LIMITS)))
    assert kinds == {Image.Image, Unreadable}


@pytest.mark.parametrize("error", [OSError(errno.EMFILE, "Too many open files"), MemoryError()])
def test_what_is_no_fault_of_the_image_is_raised(error: Exception) -> None:
    def open_file() -> io.BytesIO:
        raise error

    with pytest.raises(type(error)):
        read_image(open_file, "x", LIMITS)
