"""A file is replaced by a whole one, or stays."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from evit_ext._util.files import UNFINISHED, replacing


def test_replaced(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    Path(str(path) + UNFINISHED).write_text("left behind by a kill, and longer than what comes")
    with replacing(path) as file:
        file.write("né\r\n")
        assert path.read_text() == "old"
    assert path.read_bytes() == "né\r\n".encode()
    with replacing(path, "wb") as file:
        file.write(b"\0")
    assert path.read_bytes() == b"\0"
    assert list(tmp_path.iterdir()) == [path]


def test_as_it_was_after_an_error(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), replacing(path) as file:
        file.write("new")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_names_the_file(tmp_path: Path) -> None:
    """A failed write does not, as that of a full disk."""
    with pytest.raises(OSError, match="No space left") as caught, replacing(tmp_path / "file"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert str(tmp_path / "file") in str(caught.value)
