"""The names of classes: read, matched, and as people know them."""

from __future__ import annotations

from pathlib import Path

import pytest

from evit_ext.data.classes import (
    imagenet_names,
    match_classes,
    missing_classes,
    names_for_people,
    read_class_names,
    weights_class_names,
)


def test_files_of_names(tmp_path: Path) -> None:
    file = tmp_path / "names.txt"
    file.write_bytes(b"\xef\xbb\xbfant\r\nbee \r\ncow")  # with a BOM, as Windows' editor writes it
    assert read_class_names(file, 3) == ["ant", "bee", "cow"]
    with pytest.raises(ValueError, match="a line for each of 2 classes, got 3"):
        read_class_names(file, 2)
    file.write_text("ant\n\ncow\n")
    with pytest.raises(ValueError, match="line 2 is empty"):
        read_class_names(file)
    file.write_bytes(b"\xff\xfe\x00a")
    with pytest.raises(ValueError, match="a text file with a class a line, in UTF-8"):
        read_class_names(file)


def test_matching() -> None:
    assert match_classes({"a": 0, "b": 1}, ["c", "b", "a"], "data", "model") == {0: 2, 1: 1}
    with pytest.raises(ValueError, match="data has the classes x, y, which model does not know"):
        match_classes({"x": 0, "y": 1}, ["a"], "data", "model")
    assert missing_classes({"b": 0}, ["a", "b", "c"]) == "the classes a, c"
    assert missing_classes({"a": 0}, ["a"]) == ""


def test_imagenet() -> None:
    known = weights_class_names(1000, ["n01440764", "n01443537"])
    assert known is not None and len(known) == 1000 and known[0] == "n01440764"
    assert weights_class_names(1000, ["cat", "dog"]) is None and weights_class_names(7, ["a"]) is None
    names = imagenet_names(1000)
    assert names is not None and names[0] == "tench" == names_for_people(known)[0]
    assert names_for_people(["cat", "dog"]) == ["cat", "dog"]
