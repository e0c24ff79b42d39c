"""A time limit for benchmarks, which leave out the last of their groups; and results that survive a kill."""

from __future__ import annotations

import math
import signal
import sys
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

Group = TypeVar("Group")


class TimeLimit:
    """Says whether there is time for a group, by what groups of the same kind have taken.

    Args:
        minutes: for all groups together, from now on; None for as long as they take.
        clock: seconds, rising.
    """

    def __init__(self, minutes: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._start = clock()
        self._seconds = math.inf if minutes is None else 60 * minutes
        self._taken: dict[Hashable, float] = {}

    @property
    def passed(self) -> float:
        """Seconds since the start."""
        return self._clock() - self._start

    @property
    def clock(self) -> timedelta:
        """The time since the start, to be shown."""
        return timedelta(seconds=round(self.passed))

    @property
    def left(self) -> float:
        """Seconds until the limit, not below 0; infinite where there is none."""
        return max(0.0, self._seconds - self.passed)

    @property
    def of_one(self) -> float:
        """Seconds that a single group may take: what is left, and no more than half of all."""
        return max(1.0, min(self._seconds / 2, self.left))

    def reason_against(self, kind: Hashable, expected: float, reserve: float = 0.0) -> str | None:
        """Return in words why a group is left out, or None where it fits.

        Args:
            kind: of the group: those of a kind take about as long as each other.
            expected: seconds, if no group of this kind has been measured yet.
            reserve: seconds that are kept for what comes after.
        """
        expected = self._taken.get(kind, expected)
        left = max(0.0, self.left - reserve)
        if expected <= left:
            return None
        return f"it would take about {expected:.0f} s, and {left:.0f} s were left"

    def took(self, kind: Hashable, seconds: float) -> None:
        """Remember how long a group of a kind took, the longest of each kind."""
        self._taken[kind] = max(seconds, self._taken.get(kind, 0.0))


def gpu_is_lost() -> str:
    """Return what has happened where a GPU can no longer be used by this process; else an empty string.

    A kernel that reads or writes out of bounds, or fails an assertion, leaves a process in which every call
    to the GPU fails with the same error.
    """
    torch = sys.modules.get("torch")  # who has not imported it uses no GPU
    if torch is None or not torch.cuda.is_initialized():
        return ""
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        return f"the GPU is lost to this process: {(str(error).splitlines() or [''])[0]}"
    return ""


def in_time(
    groups: Sequence[Group],
    limit: TimeLimit,
    left_out: list[str],
    expected: Callable[[Group], float],
    kind: Callable[[Group], Hashable] = lambda group: None,
    describe: Callable[[Group], str] = str,
) -> Iterator[tuple[Group, list[str]]]:
    """Yield the groups for which there is time, one after another, and say which it is.

    Args:
        groups: in the order in which they tell most.
        limit: of time; remembers how long each group takes.
        left_out: is told of the others, and why.
        expected: seconds that a group takes if none of its kind has been measured yet.
        kind: of a group: those of a kind take about as long as each other.
        describe: a group in words.

    Yields:
        A group, and of all that come after it that they are still to come.
    """
    for number, group in enumerate(groups, 1):
        if reason := gpu_is_lost() or limit.reason_against(kind(group), expected(group)):
            left_out.append(f"{describe(group)}: {reason}")
            continue
        print(f"[{number}/{len(groups)}, {limit.clock}] {describe(group)}", flush=True)
        start = limit.passed
        yield group, [f"{describe(later)}: not yet" for later in groups[number:]]
        limit.took(kind(group), limit.passed - start)


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in what takes longer; in the main thread, at the next line of Python that runs."""
    if math.isinf(seconds):
        yield
        return

    def ring(*_: object) -> None:
        raise TimeoutError(f"it took more than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def write_whole(path: Path, text: str) -> None:
    """Write a file so that whoever is killed meanwhile leaves the old contents or the new."""
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    part.replace(path)


def left_out_lines(left_out: list[str], failures: list[str]) -> str:
    """Return a line for each group that was left out or failed, none where there is none."""
    lines = [f"Left out: {what}.\n" for what in left_out] + [f"Failed: {what}.\n" for what in failures]
    return "".join(lines)
