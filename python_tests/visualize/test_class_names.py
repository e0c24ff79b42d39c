"""Names of classes: ImageNet's, those of folders, of files, or numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from timm.data import ImageNetInfo

from evit_ext.visualize.class_names import folder_names, imagenet_names, most_probable, read_class_names


def test_imagenet() -> None:
    names = imagenet_names(1000)
    assert names is not None and len(names) == 1000
    assert (names[0], names[207], names[999]) == ("tench", "golden retriever", "toilet tissue")
    assert imagenet_names(999) is None


def test_folders_are_numbered_as_timm_does(tmp_path: Path) -> None:
    for name in ("c10", "c9", "a"):
        (tmp_path / "val" / name).mkdir(parents=True)
    (tmp_path / "val" / "notes.txt").touch()
    assert folder_names(str(tmp_path), "validation", 3) == ["a", "c9", "c10"]
    assert folder_names(str(tmp_path), "validation", 4) is None
    assert folder_names(str(tmp_path), "test", 3) is None
    assert folder_names(str(tmp_path / "gone"), "validation", 3) is None


def test_folders_of_imagenet(tmp_path: Path) -> None:
    for label in ImageNetInfo().label_names():
        (tmp_path / "validation" / label).mkdir(parents=True)
    assert folder_names(str(tmp_path), "validation", 1000) == imagenet_names(1000)


def test_a_file(tmp_path: Path) -> None:
    path = tmp_path / "names.txt"
    path.write_text("é\nb c\n", encoding="utf-8")
    assert read_class_names(path, 2) == ["é", "b c"]
    with pytest.raises(ValueError, match="a line for each of 3 classes, got 2 lines"):
        read_class_names(path, 3)
    path.write_bytes(b"\xff\n\n")
    with pytest.raises(ValueError, match="must be a text file with a class a line, in UTF-8"):
        read_class_names(path, 2)


def test_most_probable() -> None:
    probabilities = torch.tensor([0.25, 0.5, 0.125, 0.125])
    assert most_probable(probabilities, None, 2) == [("class 1", 0.5), ("class 0", 0.25)]
    assert most_probable(probabilities, list("abcd"))[0] == ("b", 0.5)
    assert len(most_probable(probabilities, None)) == 4 and most_probable(None, None) == []
