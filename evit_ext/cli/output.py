"""Output of a command whose work matters more than who reads about it."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any


class _Lasting:
    """A text stream that drops what it is given once it cannot be written any more."""

    def __init__(self, stream: Any, lost: Callable[[OSError], None]) -> None:
        self._stream = stream
        self._lost = lost

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except OSError as error:
            self._lose(error)
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._lose(error)

    def _lose(self, error: OSError) -> None:
        # What is still buffered would raise again, also when Python ends.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)
        self._lost(error)


@contextlib.contextmanager
def going_on_unread(where: str) -> Iterator[None]:
    """Go on, in the block, where standard output or standard error can no longer be written.

    As when ``head``, which reads it, has enough, or a log's disk is full: a training must not end, or count
    as failed, for that. The output that is left says it, once.

    Args:
        where: what is told of where the work goes on, such as "evit train: the run goes on in runs/a".
    """
    told = False

    def tell(error: OSError) -> None:
        nonlocal told
        if not told:
            told = True
            print(f"{where}: its output cannot be written any more ({error.strerror})", file=sys.stderr)
            sys.stderr.flush()

    with (
        contextlib.redirect_stdout(_Lasting(sys.stdout, tell)),
        contextlib.redirect_stderr(_Lasting(sys.stderr, tell)),
    ):
        yield
