"""Calls that are made in a process of their own."""

from __future__ import annotations

import contextlib
import multiprocessing
import pickle
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection
from typing import Any

from evit_ext.benchmark.settings import apply_settings, read_settings
from evit_ext.benchmark.timing import Here

#: How processes are started: macOS' own libraries do not outlive a fork, and Windows has none.
METHOD = "forkserver" if sys.platform == "linux" else "spawn"


class Apart:
    """A call that is made, and timed, in a process of its own, as in a program that does nothing else.

    What other calls have left behind in malloc, in caches of libraries and in thread pools decides how fast a
    call is: on Linux the same forward of a timm model had 50,000 page faults in a fresh process, and none
    after larger tensors than its own had been freed in the same one.

    The process is forked from one that has imported this package and computed nothing; elsewhere than on
    Linux it is a new one. It ends with :meth:`close`, or with this process. It imports the program that is
    run, which therefore does its work below ``if __name__ == "__main__":``.

    It has these settings of this process, as they are when it is made: the numbers of threads, within
    operators and between them; the default dtype and device; deterministic algorithms, with ``warn_only`` and
    ``fill_uninitialized_memory``; the backends that ``scaled_dot_product_attention`` may choose; the
    precision of float32 products, as of ``torch.set_float32_matmul_precision`` and of each backend; reduced
    precision in CUDA's matrix products; whether oneDNN and cuDNN are enabled and deterministic, and whether
    cuDNN tries algorithms; and ``evit_ext.ops.library.CUDA_ATTENTION``. It does not have: contexts such as
    ``torch.no_grad()`` and autocast, which belong into the call; ``torch._dynamo.config`` and its like;
    seeds; and ``torch.set_flush_denormal``, which cannot be read. Its environment variables are those of the
    first such process.

    Args:
        make: given `arguments`, returns the call. A function of a module.
        arguments: pickled, so that the process has copies of its own.

    Raises:
        TypeError: `make` or `arguments` cannot be pickled.
        RuntimeError: `make` has failed, or the process has ended; the message says how.
    """

    def __init__(self, make: Callable[..., Callable[[], object]], *arguments: Any) -> None:
        try:
            # Not through the pipe's own pickler, with which tensors would be shared.
            sent = pickle.dumps((read_settings(), make, arguments))
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise TypeError(
                f"what is measured in a process of its own must be picklable: {error}; "
                "measure it in this process instead (apart=False)"
            ) from error
        if METHOD == "forkserver":
            _start_fork_server()
        context: Any = multiprocessing.get_context(METHOD)
        self._line, theirs = context.Pipe()
        self._process = context.Process(target=_answer, args=(theirs,), daemon=True)
        try:
            with theirs:
                self._process.start()
            self._ask(sent)
        except BaseException:
            self.close()
            raise

    def seconds(self) -> float:
        """Make the call; return how long it took."""
        taken: float = self._ask(b"seconds")
        return taken

    def memory(self) -> int | None:
        """Make the call; return what :func:`evit_ext.benchmark.memory_added` says of it."""
        added: int | None = self._ask(b"memory")
        return added

    def close(self) -> None:
        """End the process, also in the midst of a call."""
        self._line.close()
        if self._process.pid is None:
            return
        self._process.join(1)  # waiting for a command, it ends by itself
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _ask(self, command: bytes) -> Any:
        try:
            self._line.send_bytes(command)
            answer, failure = pickle.loads(self._line.recv_bytes())
        except (EOFError, ConnectionError):
            self._process.join()
            status = self._process.exitcode
            # What fails in a call is answered: with this status, it did not come so far.
            why = '; does the program measure below `if __name__ == "__main__":`?' if status == 1 else ""
            raise RuntimeError(
                f"a process that was measured has ended, with exit status {status}{why}"
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


def _start_fork_server() -> None:
    """Start the process that others are forked from, unless it runs."""
    multiprocessing.set_forkserver_preload(["__main__", "evit_ext.benchmark"])
    resource_tracker.ensure_running()  # first: it lets signals through again
    # While it imports, Ctrl-C would print a traceback; it ends with this process.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


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
                settings, make, arguments = pickle.loads(asked)
                apply_settings(settings)
                call = Here(make(*arguments))
            else:
                answer = call.seconds() if asked == b"seconds" else call.memory()
        except Exception as error:
            failure = f"{type(error).__name__}: {error}"
        line.send_bytes(pickle.dumps((answer, failure)))
