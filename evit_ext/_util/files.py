"""Files that are there whole or not at all, whenever the process is killed.

What is being written lies in a new folder beside its place, under a name that nobody can foresee, and which
only this user can enter: nothing that others have put there is written to, not even by way of a link.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

#: How the names of folders end in which files are being written.
UNFINISHED = ".unfinished"


@contextmanager
def replacing(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Yield a file to write, which takes the place of `path` when the context ends without an error.

    It is on the disk before it does: a power failure leaves the old file or the new one, too.

    Args:
        path: the folder that it is in must be there. A link is replaced, and not what it leads to.
        mode: "w" for text, in UTF-8 with its line ends as they are; "wb" for bytes.

    Raises:
        OSError: it cannot be written; what was there before still is.
    """
    text = {} if "b" in mode else {"newline": "", "encoding": "utf-8"}
    try:
        with replacing_path(path) as unfinished, unfinished.open(mode, **text) as file:  # type: ignore[call-overload]
            yield file
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)  # which a failed write, of a full disk for instance, does not say
        raise


@contextmanager
def replacing_path(path: Path) -> Iterator[Path]:
    """As :func:`replacing`, for writers that want a path: yield that of a file that is yet to be made.

    It has the name that it will have, by whose ending some writers know a format.
    """
    with private_folder(path.parent, path.name) as folder:
        yield folder / path.name
        put(folder / path.name, path)


@contextmanager
def private_folder(parent: Path, name: str) -> Iterator[Path]:
    """Yield a new folder in `parent`, for files that :func:`put` puts in their places; then remove it.

    Args:
        parent: a folder, of the same file system as those places.
        name: which a name that a kill leaves behind is to begin with.
    """
    with tempfile.TemporaryDirectory(dir=parent, prefix=f".{name}.", suffix=UNFINISHED) as folder:
        yield Path(folder)


def put(unfinished: Path, path: Path) -> None:
    """Have a file take the place of `path`, once it is on the disk."""
    _flush(unfinished)
    unfinished.replace(path)
    _flush(path.parent)


def _flush(path: Path) -> None:
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def remove_unfinished(folder: Path) -> None:
    """Remove what a kill has left behind of files in `folder`; nobody else may be writing there."""
    for leftover in folder.glob(f".*{UNFINISHED}"):
        shutil.rmtree(leftover)
