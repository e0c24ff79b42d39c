"""Output of the commands: whether a file can be written, and going on when nobody reads any more."""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any


def say_next(*commands: Sequence[str | Path]) -> None:
    """Print the commands that come next, ready to be typed; words in capitals are to be replaced."""
    lines = ("  " + " ".join(shlex.quote(str(word)) for word in command) for command in commands)
    print("\n".join(["next:", *lines]))


def words_of(error: Exception) -> str:
    """Return an error's message; for operating system errors, the file first and without the number."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__


def words_for(options: argparse.Namespace, model: str) -> list[str]:
    """Return the arguments RUN|MODEL and those of the weights, as a command got them, for another command."""
    words = [model if options.run_folder is None else options.run_folder]
    if options.checkpoint is not None:
        words += ["--checkpoint", options.checkpoint]
    for name in ("random_weights", "pretrained"):
        if options.run_folder is None and getattr(options, name, False):
            words.append(f"--{name.replace('_', '-')}")
    if getattr(options, "last", False):
        words.append("--last")
    if getattr(options, "ema", None) is not None:
        words.append("--ema" if options.ema else "--no-ema")
    return words


def words_for_visualize(options: argparse.Namespace, model: str) -> list[str]:
    """Return the same as :func:`words_for` for ``evit visualize``, whose arguments are photographs."""
    first, *others = words_for(options, model)
    if options.run_folder is None:
        return ["--model", first, *others]
    return others or ["--checkpoint", first]


class _Lasting:
    """A text stream that discards its input once writing has failed."""

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
        # Buffered output would raise again, at the latest when Python exits.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)
        self._lost(error)


@contextlib.contextmanager
def going_on_unread(where: str) -> Iterator[None]:
    """Keep the block running when standard output or standard error can no longer be written.

    This happens when a reader such as ``head`` exits, or when a log's disk is full. A training must not stop
    or count as failed because of that. It is reported once, on the output that still works.

    Args:
        where: where the work goes on, for the report, such as "evit train: the run goes on in runs/a".
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


def check_writable(path: Path) -> None:
    """Raise OSError, before any work, if no file can be made at `path`; its folders may be missing."""
    folder = path.absolute().parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "is a file, expected a folder", str(folder))
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, "nothing may be written there", str(folder))
