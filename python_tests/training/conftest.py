"""Folders of images."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from image_data import damage, write_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """14 training images and 10 validation images of two classes."""
    return write_folder(tmp_path_factory.mktemp("loaders") / "data")


@pytest.fixture
def spoilt(folder: Path, tmp_path: Path) -> Path:
    """The same with four bad files in each split's class flower."""
    data = tmp_path / "spoilt"
    shutil.copytree(folder, data)
    for split in ("train", "val"):
        damage(data / split / "flower")
    return data
