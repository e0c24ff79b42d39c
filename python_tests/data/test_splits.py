"""Splits: folders, tar files and Arrow data sets hold the same, bad files are reports, nothing is guessed."""

from __future__ import annotations

import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from image_data import CLASSES, crop, damage, write_folder, write_parquet, write_tars

from evit_ext.data.images import ImageLimits, Unreadable
from evit_ext.data.splits import (
    ImageFiles,
    Part,
    find_parts,
    find_split,
    no_split,
    open_arrow,
    open_part,
)

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


def names(part: Part | None) -> set[str]:
    assert part is not None
    files = open_part(part, LIMITS)
    return {files.path(index) for index in range(len(files))}


def test_class_folders_without_splits(folder: Path) -> None:
    """A part of each class is held out, and nothing is both trained and evaluated on."""
    root = folder / "train"
    train, val = find_parts(str(root), "train", "validation", 0.25)
    assert len(names(train)) == 6 and len(names(val)) == 2 and not names(train) & names(val)
    assert val is not None and open_part(val, LIMITS).classes == {"china": 0, "flower": 1}
    (words,) = open_part(val, LIMITS).words
    assert "no validation split: 2 of 8 images, 25 % of each class, are held out of training" in words
    whole = find_parts(str(root), "train", "val", 1.0)[1]
    assert len(names(whole)) == 8
    assert find_parts(str(root), "train", "", 0.25)[1] is None
    # A name of one's own is not guessed at.
    assert find_parts(str(root), "photos", "val", 0.25) == (None, None)


def test_a_training_split_alone(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "train", tmp_path / "train")
    train, val = find_parts(str(tmp_path), "train", "validation", 0.25)
    assert len(names(train)) == 6 and len(names(val)) == 2
    # Where there is a test split, it may be meant: it is hinted at.
    shutil.copytree(folder / "val", tmp_path / "test")
    train, val = find_parts(str(tmp_path), "train", "validation", 0.25)
    assert len(names(train)) == 8 and val is None
    assert "to evaluate on test: --val-split test" in str(no_split(tmp_path, "validation"))
    assert len(names(find_parts(str(tmp_path), "train", "test", 0.25)[1])) == 4


def test_tar_files_with_deeper_folders(folder: Path, tmp_path: Path) -> None:
    """timm would take the innermost folder for the class."""
    path = folder / "train" / "china" / "0.jpg"

    def write(*members: str) -> None:
        with tarfile.open(tmp_path / "train.tar", "w") as tar:
            for member in members:
                tar.add(path, member)

    write("cat/2023/a.jpg", "dog/b.jpg")
    with pytest.raises(ValueError, match="at different depths.*unpack it"):
        opened(tmp_path, "train")
    write("train/cat/a.jpg", "train/dog/b.webp", "train/dog/c.txt", "./train/dog/d.jpg")
    files = opened(tmp_path, "train")
    assert files.classes == {"cat": 0, "dog": 1} and len(files) == 3
    assert "1 files skipped, whose names do not end as an image" in files.words[0]
    write("cat/a.jpg", "cat/b.jpg")
    assert opened(tmp_path, "train").classes == {"cat": 0}


def test_classes_are_matched_by_name(folder: Path) -> None:
    files = opened(folder, "val")
    files.number_classes(["apple", "flower", "china"], "the model")
    assert [files.read(index)[1] for index in range(4)] == [2, 2, 1, 1]
    with pytest.raises(ValueError, match="has the class flower, which the model does not know; it knows the"):
        files.number_classes(["china", "flowers"], "the model")


def test_timm_reads_its_own_endings_afterwards(folder: Path, tmp_path: Path) -> None:
    from timm.data.readers.img_extensions import get_img_extensions

    before = get_img_extensions()
    opened(write_tars(folder, tmp_path / "tars"), "train")
    assert get_img_extensions() == before
