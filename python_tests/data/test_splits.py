"""Splits: folders, tar files and Arrow data sets hold the same, bad files are reports, nothing is guessed."""

from __future__ import annotations

import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from image_data import CLASSES, crop, damage, write_folder, write_parquet, write_tars

from evit_ext.data.images import ImageLimits, Unreadable
from evit_ext.data.splits import ImageFiles, Part, find_split, open_arrow, open_part

LIMITS = ImageLimits(89_478_485)


def opened(data: Path | None, split: str) -> ImageFiles:
    return open_part(Part(find_split(None if data is None else str(data), split)), LIMITS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("images") / "data", train=4, val=2)


def pixels(files: ImageFiles) -> list[tuple[bytes, int]]:
    """The decoded images with their labels, in an order of their own."""
    found = [files.read(index) for index in range(len(files))]
    return sorted((image.tobytes(), label) for image, label in found)  # type: ignore[misc]


def test_a_folder(folder: Path) -> None:
    files = opened(folder, "train")
    assert len(files) == 8 and files.classes == {"china": 0, "flower": 1}
    assert files.path(5) == str(folder / "train" / "flower" / "1.jpg")
    found = files.read(5)
    assert not isinstance(found, Unreadable)
    assert found[1] == 1 and found[0].mode == "RGB"
    # JPEG at quality 90 is off by a few of 255 levels.
    difference = np.abs(np.asarray(found[0], float) - np.asarray(crop(1, 1), float))
    assert difference.mean() < 6


def test_tar_files_and_arrow_hold_the_same(folder: Path, tmp_path: Path) -> None:
    expected = pixels(opened(folder, "train"))
    tars = opened(write_tars(folder, tmp_path / "tars"), "train")
    assert pixels(tars) == expected and tars.classes == {"china": 0, "flower": 1}
    assert tars.path(5) == f"{tmp_path}/tars/train.tar: flower/1.jpg"
    parquet = write_parquet(folder, tmp_path / "parquet")
    arrow = open_arrow(f"hfds/{parquet}", str(tmp_path / "cache"), "train", LIMITS)
    assert pixels(arrow) == expected and arrow.classes == {"china": 0, "flower": 1}
    assert arrow.path(5) == f"hfds/{parquet} train[5]: flower_1.jpg"


def test_a_tar_file_for_each_class(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    for name in CLASSES:
        with tarfile.open(tmp_path / "train" / f"{name}.tar", "w") as tar:
            for path in sorted((folder / "train" / name).iterdir()):
                tar.add(path, path.name)
    files = opened(tmp_path, "train")
    assert pixels(files) == pixels(opened(folder, "train"))
    paths = [files.path(index) for index in range(8)]
    assert f"{tmp_path}/train/flower.tar: 1.jpg" in paths
    assert {files.stem(index) for index in range(8)} == {
        f"{name}/{number}" for name in CLASSES for number in range(4)
    }


def test_bad_files_are_reported(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "data")
    reasons = damage(tmp_path / "data" / "train" / "flower")
    files = opened(tmp_path / "data", "train")
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
    files = opened(tars, "train")
    whole = (tars / "train.tar").read_bytes()
    (tars / "train.tar").write_bytes(whole[: len(whole) // 2])
    found = [files.read(index) for index in range(8)]
    assert not isinstance(found[0], Unreadable)
    assert isinstance(found[7], Unreadable) and found[7].path.endswith("train.tar: flower/3.jpg")


def test_there_is_no_falling_back_to_the_whole_folder(folder: Path, tmp_path: Path) -> None:
    assert find_split(str(folder), "validation") == folder / "val"
    assert find_split(str(folder), "training") == folder / "train"
    with pytest.raises(FileNotFoundError, match=r"no split 'test'.*found train, val"):
        find_split(str(folder), "test")
    shutil.copytree(folder / "train", tmp_path / "train")
    with pytest.raises(FileNotFoundError, match="no split 'validation'"):
        opened(tmp_path, "validation")


def test_folders_that_are_no_data_set(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="data must be the folder"):
        opened(None, "train")
    with pytest.raises(FileNotFoundError, match="there is no .*nowhere"):
        opened(tmp_path / "nowhere", "train")
    (tmp_path / "train").mkdir()
    with pytest.raises(ValueError, match="train holds no images: expected <class>/<image>"):
        opened(tmp_path, "train")
    shutil.copy(folder / "train" / "china" / "0.jpg", tmp_path / "train" / "0.jpg")
    with pytest.raises(ValueError, match="outside of the classes' folders"):
        opened(tmp_path, "train")
    (tmp_path / "val.tar").write_bytes(b"")
    with pytest.raises(ValueError, match=r"val\.tar holds no images"):
        opened(tmp_path, "val")


def test_a_package_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evit_ext.data.splits.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"needs datasets: pip install \"evit_ext\[data\]\""):
        open_arrow("hfds/any", None, "train", LIMITS)
