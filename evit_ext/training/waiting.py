"""Waiting that says so, and that ends when the run is asked to stop."""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

_Item = TypeVar("_Item")

#: Seconds of waiting after which it is told, and told again after twice, four times, … as many.
TOLD_AFTER = 10.0
#: Seconds after a signal in which a wait for images must end, or the process is ended.
GRACE = 3.0
#: The same for other processes, which may have a long step to finish. Schedulers kill after 30 s.
GRACE_OF_RANKS = 25.0
#: A step may take so many times as long as the longest before it, if that is more.
PATIENCE = 3.0
#: Seconds after the first SIGTERM from which on another one ends the process.
SECOND = 2.0


@contextmanager
def told(what: str) -> Iterator[None]:
    """Say after :data:`TOLD_AFTER` seconds what the process waits for in the context, if it still does."""

    def say() -> None:
        print(f"waiting for {what}, for {TOLD_AFTER:.0f} s now", file=sys.stderr, flush=True)

    timer = threading.Timer(TOLD_AFTER, say)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


class Watch:
    """A thread that says what a process waits for, and ends a process that was asked to stop and cannot.

    Without :meth:`start`, nothing is watched, and :meth:`waiting` costs nothing.
    """

    def __init__(self) -> None:
        self.what = ""
        self._since = 0.0
        self._interruptible = False
        self._leaving = False
        self._doing, self._began, self._longest = "", 0.0, 0.0
        self._thread: threading.Thread | None = None
        self._ended = threading.Event()

    @property
    def can_be_interrupted(self) -> bool:
        """Whether the main thread waits for something that an exception may end."""
        return bool(self.what) and self._interruptible

    @contextmanager
    def waiting(self, what: str, interruptible: bool = False) -> Iterator[None]:
        """Wait in the context, in the main thread; `what` for completes "waiting for …"."""
        self._since, self._interruptible, self.what = time.monotonic(), interruptible, what
        try:
            yield
        finally:
            self.what = ""

    def waited_for(self, items: Iterable[_Item], what: str, interruptible: bool) -> Iterator[_Item]:
        """Yield the items, each waited for."""
        iterator = iter(items)
        while True:
            self.begin("")  # a wait is no part of the work
            with self.waiting(what, interruptible):
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item

    def begin(self, doing: str) -> None:
        """Note that a part of the work begins, and what was begun before has ended.

        Once the process was asked to stop, no part may take much longer than those before it: in a step, too,
        it can wait for another process without end.

        Args:
            doing: what, such as "step 12"; "" for what takes as long as it takes, such as writing a file.
        """
        now = time.monotonic()
        if self._doing:
            self._longest = max(self._longest, now - self._began)
        self._began, self._doing = now, doing

    def leave(self) -> None:
        """Have the process ended after :data:`GRACE` seconds if it has not ended by itself."""
        self.what = "the processes that load images to end"
        self._since, self._interruptible, self._leaving = time.monotonic(), False, True

    def start(self, signals: int, advice: Callable[[], str]) -> None:
        """Watch, until :meth:`end`.

        Args:
            signals: file descriptor from which the numbers of the signals come, a byte each.
            advice: what to say before the process is ended.
        """
        self._ended.clear()
        self._thread = threading.Thread(target=self._run, args=(signals, advice), daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Watch no more."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self, signals: int, advice: Callable[[], str]) -> None:
        asked: float | None = None  # when the first signal came
        number = signal.SIGTERM
        tell_at, told_of = 0.0, 0.0
        while not self._ended.is_set():
            ready, _, _ = select.select([signals], [], [], 0.2)
            now = time.monotonic()
            if ready:
                numbers = os.read(signals, 64)
                if asked is None and set(numbers) & {signal.SIGTERM, signal.SIGINT}:
                    asked = now
                    number = signal.SIGINT if signal.SIGTERM not in numbers else number
                elif asked is not None and signal.SIGTERM in numbers and now - asked > SECOND:
                    self._exit("a second signal came", advice, signal.SIGTERM)
            what, since = self.what, self._since
            doing, began = self._doing, self._began
            if not what and doing and asked is not None:
                limit = max(GRACE_OF_RANKS, PATIENCE * self._longest)
                if now - max(asked, began) > limit:
                    said = f"{doing} does not end, {now - asked:.0f} s after being asked to stop"
                    self._exit(said, advice, number)
            if not what:
                continue
            if told_of != since:
                tell_at, told_of = since + TOLD_AFTER, since
            if now > tell_at:
                print(f"waiting for {what}, for {now - since:.0f} s now", file=sys.stderr, flush=True)
                tell_at = since + 2 * (now - since)
            grace = GRACE if self._interruptible or self._leaving else GRACE_OF_RANKS
            if asked is not None and now - max(asked, since) > grace:
                self._exit(
                    f"still waiting for {what}, {now - asked:.0f} s after being asked to stop", advice, number
                )

    def _exit(self, why: str, advice: Callable[[], str], number: int) -> None:
        def say() -> None:
            print(f"evit train: {why}: ended; {advice()}", file=sys.stderr, flush=True)

        # The folder of the run, or the terminal, may be what does not answer.
        thread = threading.Thread(target=say, daemon=True)
        thread.start()
        thread.join(SECOND)
        os._exit(128 + number)
