"""A run's folder: kept for one run at a time, and gone again where the run was refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from evit_ext.training.ranks import ALONE
from evit_ext.training.run.lock import FolderLock

# argv: a folder; locks it, and keeps it until standard input ends.
_HOLDS = """
import sys
from pathlib import Path
from evit_ext.training.run.lock import FolderLock
from evit_ext.training.ranks import ALONE
lock = FolderLock(Path(sys.argv[1]), ALONE)
print("locked", flush=True)
sys.stdin.read()
"""


def test_what_was_made_is_taken_away_again(tmp_path: Path) -> None:
    FolderLock(tmp_path / "runs" / "a", ALONE).discard()
    assert not any(tmp_path.iterdir())
    (tmp_path / "runs" / "b").mkdir(parents=True)
    FolderLock(tmp_path / "runs" / "a", ALONE).discard()
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["b"]


def test_what_was_there_stays(tmp_path: Path) -> None:
    FolderLock(tmp_path, ALONE).discard()
    assert (tmp_path / "lock").exists()
    lock = FolderLock(tmp_path / "a", ALONE)
    (tmp_path / "a" / "notes.txt").touch()  # by somebody else, meanwhile
    lock.discard()
    assert {path.name for path in (tmp_path / "a").iterdir()} == {"lock", "notes.txt"}
    FolderLock(tmp_path / "b", ALONE).release()
    assert (tmp_path / "b" / "lock").exists()


def test_a_run_that_is_refused_takes_nothing_from_the_one_at_work(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    command = [sys.executable, "-c", _HOLDS, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "locked\n"
        with pytest.raises(ValueError, match=f"another run is using {folder}"):
            FolderLock(folder, ALONE)
        assert (folder / "lock").exists()
        other.communicate()
    FolderLock(folder, ALONE).release()


def test_a_lock_that_was_taken_away_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between opening the file and locking it: whoever comes next would lock another file of that name."""
    opened = os.open

    def open_and_lose(path: Path, flags: int, mode: int = 0o777) -> int:
        file = opened(path, flags, mode)
        path.unlink()
        return file

    monkeypatch.setattr(os, "open", open_and_lose)
    with pytest.raises(ValueError, match="another run is using"):
        FolderLock(tmp_path / "run", ALONE)


def test_a_file_of_that_name(tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    with pytest.raises(NotADirectoryError, match="is a file, expected a run's folder"):
        FolderLock(tmp_path / "run", ALONE)
