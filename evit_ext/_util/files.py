"""Files that are there whole or not at all, whenever the process is killed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

#: What is added to the name of a file that is being written.
UNFINISHED = ".unfinished"


@contextmanager
def replacing(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Yield a file to write, which takes the place of `path` when the context ends without an error.

    It is on the disk before it does: a power failure leaves the old file or the new one, too.

    Args:
        path: beside it lies what is being written, which a kill may leave behind and the next call replaces.
        mode: "w" for text, in UTF-8 with its line ends as they are; "wb" for bytes.

    Raises:
        OSError: it cannot be written; what was there before still is.
    """
    unfinished = path.with_name(path.name + UNFINISHED)
    text = {} if "b" in mode else {"newline": "", "encoding": "utf-8"}
    try:
        with unfinished.open(mode, **text) as file:  # type: ignore[call-overload]
            yield file
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except BaseException as error:
        unfinished.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            error.filename = str(path)  # which a failed write, of a full disk for instance, does not say
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
