"""Calls in separate processes."""

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

from evit_ext._util.timing import Here
from evit_ext.benchmark.settings import apply_settings, read_settings

#: How processes are started: macOS's own libraries do not survive a fork, and Windows has no fork.
METHOD = "forkserver" if sys.platform == "linux" else "spawn"


class Apart:
    """A call that is made and timed in its own process, as in a program that does nothing else.

    The speed of a call depends on what earlier calls left behind in malloc, in caches of libraries and in
    thread pools. On Linux, the same forward of a timm model had 50,000 page faults in a fresh process, and
    none in a process that had freed larger tensors before.

    On Linux the process is forked from one that has imported this package but computed nothing; on other
    systems it is a new one. It ends with :meth:`close` or with this process. It imports the main program,
    which must therefore do its work below ``if __name__ == "__main__":``.

    When created, it copies these settings of this process: the numbers of threads within and between
    operators; the default dtype and device; deterministic algorithms, with ``warn_only`` and
    ``fill_uninitialized_memory``; the backends that ``scaled_dot_product_attention`` may choose; the
    precision of float32 products, as set by ``torch.set_float32_matmul_precision`` and for each backend;
    reduced precision in CUDA's matrix products; whether oneDNN and cuDNN are enabled and deterministic, and
    whether cuDNN tries algorithms; and ``evit_ext.ops.library.CUDA_ATTENTION``. It does not copy: contexts
    such as ``torch.no_grad()`` and autocast, which belong inside the call; ``torch._dynamo.config`` and
    similar; seeds; and ``torch.set_flush_denormal``, which cannot be read. Its environment variables are
    those of the first such process.

    Args:
        make: called with `arguments`, returns the call. Must be a module-level function.
        arguments: pickled, so that the process has its own copies.

    Raises:
        TypeError: `make` or `arguments` cannot be pickled.
        RuntimeError: `make` has failed or the process has ended; the message says how.
    """

    def __init__(self, make: Callable[..., Callable[[], object]], *arguments: Any) -> None:
        try:
            # Not with the pipe's own pickler, which would share the tensors.
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
        """Make the call and return the seconds it took."""
        taken: float = self._ask(b"seconds")
        return taken

    def memory(self) -> int | None:
        """Make the call and return its :func:`evit_ext.benchmark.memory_added`."""
        added: int | None = self._ask(b"memory")
        return added

    def close(self) -> None:
        """End the process, even in the middle of a call."""
        self._line.close()
        if self._process.pid is None:
            return
        self._process.join(1)  # a process waiting for a command ends by itself
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
            # A failing call is answered with its error; status 1 means that the process did not get that far.
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
    """Provide ``Apart(make, *arguments)`` for each name, and end all processes afterwards."""
    with contextlib.ExitStack() as stack:
        calls = {}
        for name, (make, arguments) in makes.items():
            calls[name] = Apart(make, *arguments)
            stack.callback(calls[name].close)
        yield calls


def _start_fork_server() -> None:
    """Start the process that others are forked from, unless it is running."""
    multiprocessing.set_forkserver_preload(["__main__", "evit_ext.benchmark"])
    resource_tracker.ensure_running()  # must come first, because it unblocks signals
    # Ctrl-C during its imports would print a traceback; it ends with this process anyway.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _answer(line: Connection) -> None:
    """Main function of the process: prepare the call, then make it whenever asked."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the asking process ends, which closes the line
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
