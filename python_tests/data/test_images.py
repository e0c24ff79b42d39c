"""Reading images: what timm's readers find, and bad files as reports."""

from __future__ import annotations

import errno
import io
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from image_data import CLASSES, crop, damage, encoded, huge_png, write_folder, write_parquet, write_tars
from PIL import Image

from evit_ext.data.images import ImageFiles, Unreadable, find_split, open_images, read_image

LIMIT = 89_478_485


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("images") / "data", train=4, val=2)


def pixels(files: ImageFiles) -> list[tuple[bytes, int]]:
    """The decoded images with their labels, in an order of their own."""
    found = [files.read(index) for index in range(len(files))]
    return sorted((image.tobytes(), label) for image, label in found)  # type: ignore[misc]


def test_a_folder(folder: Path) -> None:
    files = open_images("", str(folder), "train", LIMIT)
    assert len(files) == 8 and files.classes == {"china": 0, "flower": 1}
    assert files.path(5) == str(folder / "train" / "flower" / "1.jpg")
    found = files.read(5)
    assert not isinstance(found, Unreadable)
    assert found[1] == 1 and found[0].mode == "RGB"
    # JPEG at quality 90 is off by a few of 255 levels.
    difference = np.abs(np.asarray(found[0], float) - np.asarray(crop(1, 1), float))
    assert difference.mean() < 6


def test_tar_files_and_arrow_hold_the_same(folder: Path, tmp_path: Path) -> None:
    expected = pixels(open_images("", str(folder), "train", LIMIT))
    tars = open_images("", str(write_tars(folder, tmp_path / "tars")), "train", LIMIT)
    assert pixels(tars) == expected and tars.classes == {"china": 0, "flower": 1}
    assert tars.path(5) == f"{tmp_path}/tars/train.tar: flower/1.jpg"
    parquet = write_parquet(folder, tmp_path / "parquet")
    arrow = open_images(f"hfds/{parquet}", str(tmp_path / "cache"), "train", LIMIT)
    assert pixels(arrow) == expected and arrow.classes == {"china": 0, "flower": 1}
    assert arrow.path(5) == f"hfds/{parquet} train[5]: flower_1.jpg"


def test_a_tar_file_for_each_class(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    for name in CLASSES:
        with tarfile.open(tmp_path / "train" / f"{name}.tar", "w") as tar:
            for path in sorted((folder / "train" / name).iterdir()):
                tar.add(path, path.name)
    files = open_images("", str(tmp_path), "train", LIMIT)
    assert pixels(files) == pixels(open_images("", str(folder), "train", LIMIT))
    paths = [files.path(index) for index in range(8)]
    assert f"{tmp_path}/train/flower.tar: 1.jpg" in paths
    assert {files.stem(index, files.read(index)[1]) for index in range(8)} == {
        f"{name}/{number}" for name in CLASSES for number in range(4)
    }


def test_bad_files_are_reported(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "data")
    reasons = damage(tmp_path / "data" / "train" / "flower")
    files = open_images("", str(tmp_path / "data"), "train", LIMIT)
    (tmp_path / "data" / "train" / "china" / "2.jpg").unlink()
    reasons["2.jpg of china"] = "No such file"
    reports = [found for found in map(files.read, range(8)) if isinstance(found, Unreadable)]
    assert [Path(report.path).name for report in reports] == ["2.jpg", "0.jpg", "1.jpg", "2.jpg", "3.jpg"]
    assert [Path(report.path).parent.name for report in reports] == ["china", *["flower"] * 4]
    for report in reports:
        name = Path(report.path).name
        assert reasons["2.jpg of china" if "china" in report.path else name] in report.reason


def test_a_tar_file_that_ends_early(folder: Path, tmp_path: Path) -> None:
    tars = write_tars(folder, tmp_path / "tars")
    files = open_images("", str(tars), "train", LIMIT)
    whole = (tars / "train.tar").read_bytes()
    (tars / "train.tar").write_bytes(whole[: len(whole) // 2])
    found = [files.read(index) for index in range(8)]
    assert not isinstance(found[0], Unreadable)
    assert isinstance(found[7], Unreadable) and found[7].path.endswith("train.tar: flower/3.jpg")


def test_the_size_is_looked_at_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a limit of our own, below and above Pillow's."""
    image = Image.new("L", (30, 20))
    file = io.BytesIO()
    image.save(file, "PNG")

    def read(data: bytes, limit: int) -> Image.Image | Unreadable:
        return read_image(lambda: io.BytesIO(data), "x.png", limit)

    assert isinstance(read(file.getvalue(), 600), Image.Image)
    report = read(file.getvalue(), 599)
    assert report == Unreadable("x.png", "ValueError: 30x20 pixels, more than max_image_pixels 599")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert isinstance(read(file.getvalue(), 600), Image.Image)
    assert Image.MAX_IMAGE_PIXELS == 100

    def decode(*_: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decode)
    assert "100000x100000" in read(huge_png(), LIMIT).reason  # type: ignore[union-attr]


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_other_modes_become_rgb(mode: str) -> None:
    file = io.BytesIO()
    crop(0, 1).convert(mode).save(file, "TIFF")
    image = read_image(lambda: io.BytesIO(file.getvalue()), "x.tif", LIMIT)
    assert isinstance(image, Image.Image) and image.mode == "RGB"


def test_no_other_program_is_run_for_an_image() -> None:
    """An EPS file, whatever its name ends in, is a program, for which Pillow would start Ghostscript."""
    file = io.BytesIO()
    crop(0, 1).save(file, "EPS")
    assert read_image(lambda: file, "x.jpg", LIMIT) == Unreadable("x.jpg", "not an image that Pillow knows")


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
        kinds.add(type(read_image(lambda data=data: io.BytesIO(bytes(data)), "x", LIMIT)))
    assert kinds == {Image.Image, Unreadable}


@pytest.mark.parametrize("error", [OSError(errno.EMFILE, "Too many open files"), MemoryError()])
def test_what_is_no_fault_of_the_image_is_raised(error: Exception) -> None:
    def open_file() -> io.BytesIO:
        raise error

    with pytest.raises(type(error)):
        read_image(open_file, "x", LIMIT)


def test_there_is_no_falling_back_to_the_whole_folder(folder: Path, tmp_path: Path) -> None:
    assert find_split(str(folder), "validation") == folder / "val"
    assert find_split(str(folder), "training") == folder / "train"
    with pytest.raises(FileNotFoundError, match=r"no split 'test'.*found train, val"):
        find_split(str(folder), "test")
    shutil.copytree(folder / "train", tmp_path / "train")
    with pytest.raises(FileNotFoundError, match="no split 'validation'"):
        open_images("", str(tmp_path), "validation", LIMIT)


def test_folders_that_are_no_data_set(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="data must be the folder"):
        open_images("", None, "train", LIMIT)
    with pytest.raises(FileNotFoundError, match="there is no .*nowhere"):
        open_images("", str(tmp_path / "nowhere"), "train", LIMIT)
    (tmp_path / "train").mkdir()
    with pytest.raises(ValueError, match="train holds no images: expected <class>/<image>"):
        open_images("", str(tmp_path), "train", LIMIT)
    shutil.copy(folder / "train" / "china" / "0.jpg", tmp_path / "train" / "0.jpg")
    with pytest.raises(ValueError, match="outside of the classes' folders"):
        open_images("", str(tmp_path), "train", LIMIT)
    (tmp_path / "val.tar").write_bytes(b"")
    with pytest.raises(ValueError, match=r"val\.tar holds no images"):
        open_images("", str(tmp_path), "val", LIMIT)


def test_a_package_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evit_ext.data.images.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"needs datasets: pip install \"evit_ext\[data\]\""):
        open_images("hfds/any", None, "train", LIMIT)
