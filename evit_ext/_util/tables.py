"""Helpers of several commands: tables, and a check that a file can be written."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Return the cells as a table, the first column aligned left and the others right."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def check_writable(path: Path) -> None:
    """Raise OSError, before any work, if no file can be made at `path`; its folders may be missing."""
    folder = path.absolute().parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "is a file, expected a folder", str(folder))
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, "nothing may be written there", str(folder))
