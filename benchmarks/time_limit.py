"""Measures groups one after another within a time limit: one that fails or does not fit costs no other."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

Group = TypeVar("Group")


@dataclass
class Missing:
    """The groups of which there are no figures, in words, with the reason."""

    left_out: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"Left out: {what}." for what in self.left_out] + [
            f"Failed: {what}." for what in self.failures
        ]
        return "\n\n".join(lines)


def in_time(
    groups: Sequence[Group],
    measure: Callable[[Group], object],
    minutes: float | None,
    expected: Callable[[Group], float],
    after_each: Callable[[Missing], object],
) -> Missing:
    """Measure every group for which there is time; `after_each` may write what there is so far.

    Args:
        groups: in the order in which they are measured.
        measure: one group; if it raises, that is noted.
        minutes: for all groups together; None for as long as they take.
        expected: seconds that a group takes. It is not begun with less time, and ended when none is left.
        after_each: called after each group that was begun.
    """
    missing = Missing()
    start = time.monotonic()
    for number, group in enumerate(groups, 1):
        passed = time.monotonic() - start
        left = math.inf if minutes is None else max(0.0, 60 * minutes - passed)
        if expected(group) > left:
            missing.left_out.append(f"{group} (takes about {expected(group):.0f} s, {left:.0f} s were left)")
            continue
        print(f"[{number}/{len(groups)}, {passed:.0f} s] {group}", flush=True)
        try:
            with at_most(left):
                measure(group)
        except Exception as error:
            missing.failures.append(f"{group}: {first_line(error)}")
            print(f"failed: {missing.failures[-1]}", flush=True)
        after_each(missing)
    return missing


def first_line(error: Exception) -> str:
    """Return the type and the first line of an error."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in what takes longer; in the main thread, at the next line of Python that runs."""
    if math.isinf(seconds):
        yield
        return

    def ring(*_: object) -> None:
        raise TimeoutError(f"it took more than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
