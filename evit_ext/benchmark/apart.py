"""Calls that are made in a process of their own."""

from __future__ import annotations

import contextlib
import multiprocessing
import pickle
import signal
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection
from typing import Any

import torch

from evit_ext.benchmark.timing import Here


class Apart:
    """A call that is made, and timed, in a process of its own, as in a program that does nothing else.

    What other calls have left behind in malloc, in caches of libraries and in thread pools decides how fast a
    call is: on Linux the same forward of a timm model had 50,000 page faults in a fresh process, and none
    after larger tensors than its own had been freed in the same one.

    The process is forked from one that has imported this package and computed nothing. It ends with
    :meth:`close`, or with this process.

    Args:
        make: given `arguments`, returns the call. A function of a module.
        arguments: pickled, so that the process has copies of its own.

    Raises:
        TypeError: `make` or `arguments` cannot be pickled.
        RuntimeError: `make` has failed; the message says how.
    """

    def __init__(self, make: Callable[..., Callable[[], object]], *arguments: Any) -> None:
        try:
            # Not through the pipe's own pickler, with which tensors would be shared.
            sent = pickle.dumps((torch.get_num_threads(), make, arguments))
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise TypeError(
                f"what is measured in a process of its own must be picklable: {error}; "
                "measure it in this process instead (apart=False)"
            ) from error
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["__main__", "evit_ext.benchmark"])
        self._line, theirs = context.Pipe()
        self._process = context.Process(target=_answer, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()
        self._line.send_bytes(sent)
        self._receive()

    def seconds(self) -> float:
        """Make the call; return how long it took."""
        taken: float = self._ask("seconds")
        return taken

    def memory(self) -> int | None:
        """Make the call; return what :func:`evit_ext.benchmark.memory_added` says of it."""
        added: int | None = self._ask("memory")
        return added

    def close(self) -> None:
        """End the process."""
        self._line.close()
        self._process.join()

    def _ask(self, command: str) -> Any:
        self._line.send_bytes(command.encode())
        return self._receive()

    def _receive(self) -> Any:
        try:
            answer, failure = pickle.loads(self._line.recv_bytes())
        except EOFError:
            self._process.join()
            raise RuntimeError(
                f"a process that was measured has ended, with exit status {self._process.exitcode}"
            ) from None
        if failure is not None:
            raise RuntimeError(f"in a process that was measured: {failure}")
        return answer


@contextlib.contextmanager
def apart(
    makes: Mapping[str, tuple[Callable[..., Callable[[], object]], tuple[Any, ...]]],
) -> Iterator[dict[str, Apart]]:
    """Give, for each name, what ``Apart(make, *arguments)`` is; end all processes afterwards."""
    with contextlib.ExitStack() as stack:
        calls = {}
        for name, (make, arguments) in makes.items():
            calls[name] = Apart(make, *arguments)
            stack.callback(calls[name].close)
        yield calls


def _answer(line: Connection) -> None:
    """Be the process: make the call that is described, and then whenever asked."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that asks ends, and with it the line
    with contextlib.suppress(EOFError, ConnectionError):
        _answer_all(line)


def _answer_all(line: Connection) -> None:
    call: Here | None = None
    while True:
        asked = line.recv_bytes()
        answer, failure = None, None
        try:
            if call is None:
                threads, make, arguments = pickle.loads(asked)
                torch.set_num_threads(threads)
                call = Here(make(*arguments))
            else:
                answer = call.seconds() if asked == b"seconds" else call.memory()
        except Exception as error:
            failure = f"{type(error).__name__}: {error}"
        line.send_bytes(pickle.dumps((answer, failure)))
