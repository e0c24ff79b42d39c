"""Being asked to stop: by a scheduler that needs the machine (SIGTERM), or from the keyboard (SIGINT)."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class Stopped(Exception):
    """The run was asked to stop, and has written a checkpoint to resume from.

    Attributes:
        signal: the signal's number; 0 on a process that did not receive it itself.
    """

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.signal = number


class StopSignals:
    """While it is entered, SIGTERM and SIGINT are only noted; a second SIGINT interrupts at once.

    Outside of the main thread, where Python takes no signals, nothing is noted.
    """

    def __init__(self) -> None:
        self.number = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = number
