"""Being asked to stop: by a scheduler that needs the machine (SIGTERM), or from the keyboard (SIGINT)."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

from evit_ext.training.waiting import Watch


class Stopped(Exception):
    """The run was asked to stop, and has written a checkpoint to resume from.

    Attributes:
        signal: the signal's number; 0 on a process that did not receive it itself.
    """

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.signal = number


class StoppedWaiting(BaseException):
    """The run was asked to stop while it waited for something that may never come.

    No Exception, which the reading of an image would take for the image's failure.
    """


class StopSignals:
    """While it is entered, SIGTERM and SIGINT let a run end in order.

    The first signal is noted, for the run to stop at the end of its step. If the run waits for images (see
    :meth:`Watch.waiting`), :class:`StoppedWaiting` is raised instead. A second SIGINT interrupts at once. A
    second SIGTERM, two seconds or more after the first (launchers pass the first one on, so that it comes
    twice), ends the process whatever it does, and so does a wait that does not end: complete checkpoints are
    kept.

    Outside of the main thread, where Python takes no signals, nothing is noted.

    Args:
        watch: knows whether the run waits.
        advice: what to say before the process is ended.
    """

    def __init__(self, watch: Watch, advice: Callable[[], str] = str) -> None:
        self.number = 0
        self._watch, self._advice = watch, advice
        self._before: dict[int, Any] = {}
        self._pipe: tuple[int, int] | None = None

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
            # Python's handlers run only between steps of Python; a byte in the pipe reaches the watch always.
            self._pipe = os.pipe()
            os.set_blocking(self._pipe[1], False)
            signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
            self._watch.start(self._pipe[0], self._advice)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._pipe is not None:
            signal.set_wakeup_fd(-1)
            self._watch.end()
            for end in self._pipe:
                os.close(end)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = number
        if self._watch.can_be_interrupted:
            raise StoppedWaiting(f"asked to stop while waiting for {self._watch.what}")
