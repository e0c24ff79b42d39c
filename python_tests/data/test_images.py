"""Reading an image: limits, modes, orientation, and bad files as reports."""

from __future__ import annotations

import errno
import io
import os
import warnings

import numpy as np
import pytest
from image_data import crop, encoded, huge_png
from PIL import Image

from evit_ext.data.images import ImageLimits, Unreadable, printable, read_image

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


def saved(image: Image.Image, kind: str, **more: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **more)
    return file.getvalue()


def read(data: bytes, limits: ImageLimits = LIMITS) -> Image.Image | Unreadable:
    return read_image(lambda: io.BytesIO(data), "x.png", limits)


RAMP = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)


def netpbm(values: np.ndarray, white: int) -> bytes:
    return f"P5 64 64 {white}\n".encode() + values.astype(">u2").tobytes()


@pytest.mark.parametrize(
    "data",
    [
        saved(Image.fromarray(RAMP), "PNG"),
        saved(Image.fromarray(RAMP), "TIFF"),
        saved(Image.fromarray(RAMP.astype(">u2")), "TIFF"),
        saved(Image.fromarray(RAMP), "JPEG2000"),
        netpbm(RAMP, 65535),
        netpbm(RAMP // 16, 4095),
    ],
    ids=["png", "tiff", "tiff-big-endian", "jpeg2000", "pgm", "pgm-12-bits"],
)
def test_grey_of_sixteen_bits_is_scaled(data: bytes) -> None:
    image = read(data)
    assert isinstance(image, Image.Image) and image.mode == "RGB"
    pixels = np.asarray(image, float)
    assert abs(pixels - RAMP[..., None] / 257).max() <= 1
    assert (pixels == 255).mean() < 0.01


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_grey_of_thirty_two_bits_has_no_white(dtype: type) -> None:
    found = read(saved(Image.fromarray(np.arange(64, dtype=dtype).reshape(8, 8)), "TIFF"))
    assert isinstance(found, Unreadable) and "whose white is not known: store 8 or 16 bits" in found.reason


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_the_way_up_that_the_camera_noted(kind: str) -> None:
    image = Image.new("RGB", (40, 20), "black")
    image.paste((255, 255, 255), (0, 0, 40, 10))  # white above
    exif = image.getexif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    found = read(saved(image, kind, exif=exif))
    assert isinstance(found, Image.Image) and found.size == (20, 40)
    assert found.getpixel((15, 20)) > (200,) * 3 and found.getpixel((5, 20)) < (50,) * 3  # type: ignore[operator]


def test_palettes_and_transparency_show_the_colours_below(caplog: pytest.LogCaptureFixture) -> None:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 200, 100, 50])
    transparent = saved(image, "PNG", transparency=bytes([0, 0]))
    for data in (transparent, saved(Image.new("RGBA", (4, 4), (200, 100, 50, 0)), "PNG")):
        found = read(data)
        assert isinstance(found, Image.Image) and found.getpixel((0, 0)) == (200, 100, 50)
    assert not caplog.records


@pytest.mark.parametrize("size", [(5000, 1), (1, 5000), (89_000_000, 1)])
def test_what_a_resize_would_make_counts_too(size: tuple[int, int]) -> None:
    data = saved(Image.new("L", size), "PNG")
    assert len(data) < 300_000
    found = read(data, ImageLimits(LIMITS.max_pixels, 256))
    assert isinstance(found, Unreadable)
    assert "resized to a shorter side of 256 it would have" in found.reason
    if max(size) == 5000:
        assert isinstance(read(data), Image.Image)  # a picture that is not resized
    assert isinstance(read(saved(Image.new("L", (3000, 9)), "PNG"), ImageLimits(10**8, 256)), Image.Image)


def test_warnings_name_the_file_once(caplog: pytest.LogCaptureFixture) -> None:
    def open_file() -> io.BytesIO:
        warnings.warn("this is an odd file", UserWarning, stacklevel=1)
        return io.BytesIO(encoded(0, 1))

    for name in ("first.jpg", "second.jpg"):
        assert isinstance(read_image(open_file, name, LIMITS), Image.Image)
    assert [record.getMessage() for record in caplog.records] == [
        "first.jpg: this is an odd file (reported once, of the first such image)"
    ]


def test_names_become_text_on_one_line() -> None:
    name = os.fsdecode("照片".encode("gbk") + b".jpg")
    assert printable(name) == "\\xd5\\xd5Ƭ.jpg"
    printable(name).encode("utf-8")
    assert printable("a\nb\u200b") == "a\\nb\\u200b"
    assert printable("e\u0301") == printable("\u00e9") == "é"
    assert printable("照片 1.jpg") == "照片 1.jpg"
    assert read_image(lambda: io.BytesIO(b""), name, LIMITS).path == printable(name)  # type: ignore[union-attr]
