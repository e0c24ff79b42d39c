"""A file is replaced by a whole one, or stays."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from evit_ext._util.files import remove_unfinished, replacing, replacing_path


def test_replaced(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
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


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_nothing_is_written_through_a_planted_link(tmp_path: Path) -> None:
    """Neither through one in the place of the file, nor can one be planted where it is written."""
    victim, path = tmp_path / "victim", tmp_path / "file.pt2"
    victim.write_text("mine")
    path.symlink_to(victim)
    seen = []
    for _ in range(2):
        with replacing_path(path) as unfinished:
            assert unfinished.name == path.name and not os.path.lexists(unfinished)
            assert unfinished.parent.stat().st_mode & 0o777 == 0o700
            seen.append(unfinished.parent.name)
            unfinished.write_text("new")
    assert seen[0] != seen[1]
    assert victim.read_text() == "mine" and not path.is_symlink() and path.read_text() == "new"
    assert names(tmp_path) == ["file.pt2", "victim"]


def test_two_writers_of_one_file(tmp_path: Path) -> None:
    """Each has a file of its own, and the last one to finish is what remains."""
    path = tmp_path / "file"
    with replacing(path) as first:
        with replacing(path) as second:
            first.write("first")
            second.write("second, and longer")
        assert path.read_text() == "second, and longer"
    assert path.read_text() == "first"
    assert names(tmp_path) == ["file"]


def test_readable_by_those_whom_the_umask_lets(tmp_path: Path) -> None:
    """The folder is private, the file is not."""
    before = os.umask(0o027)
    try:
        with replacing(tmp_path / "file") as file:
            file.write("text")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


def test_what_a_kill_leaves_behind(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        with replacing(tmp_path / "file") as file:
            file.write("half")
            file.flush()
            os._exit(0)
    os.waitpid(child, 0)
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".file.") and left.is_dir()
    remove_unfinished(tmp_path)
    assert not names(tmp_path)
