"""Progress: a bar on a terminal, occasional lines elsewhere."""

from __future__ import annotations

import os
import sys
import time
from datetime import timedelta
from typing import Any

_SECONDS_BETWEEN_LINES = 15.0
_COLUMNS, _ROWS = 100, 24


class Progress:
    """Progress over `total` steps, with the latest values of some figures.

    On a terminal with tqdm installed it is tqdm's bar; otherwise lines on stdout, at most one every 15
    seconds and one at the end, so that a log file stays readable. A line estimates how much time is left; the
    last one says how long it took.

    Args:
        description: what is in progress.
        total: number of steps, including those before `start`; None if it is not known.
        enabled: False prints nothing.
        start: steps done before, for instance in an epoch that is resumed.

    Raises:
        ValueError: `start` is not in [0, total].
    """

    def __init__(self, description: str, total: int | None, enabled: bool = True, start: int = 0) -> None:
        if start < 0 or (total is not None and start > total):
            raise ValueError(f"start must be in [0, {total}], the steps in all, got {start}")
        self._description = description
        self._total = total
        self._enabled = enabled
        self._start = self._done = start
        self._figures: dict[str, str] = {}
        self._bar: Any = None
        self._began = self._printed = time.perf_counter()
        if enabled and sys.stdout.isatty():
            try:
                from tqdm import tqdm
            except ImportError:
                return
            # A terminal that does not know its width says 0, and tqdm then shows nothing.
            size = {} if _knows_its_width(sys.stdout) else {"ncols": _COLUMNS, "nrows": _ROWS}
            self._bar = tqdm(
                desc=description,
                total=total,
                initial=start,
                file=sys.stdout,
                dynamic_ncols=not size,
                **size,
            )

    def step(self, **figures: str) -> None:
        """Count a step and show the given figures; without any, those given last."""
        self._done += 1
        self._figures = figures or self._figures
        if self._bar is not None:
            self._bar.set_postfix(self._figures, refresh=False)
            self._bar.update()
        elif (
            self._enabled
            and self._done != self._total  # the last line follows at once
            and time.perf_counter() - self._printed >= _SECONDS_BETWEEN_LINES
        ):
            self._line(f"{_clock(self._seconds_left())} left" if self._total is not None else "")

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()
        elif self._enabled and self._done > self._start:
            self._line(f"in {_clock(time.perf_counter() - self._began)}")

    def _seconds_left(self) -> float:
        assert self._total is not None
        a_step = (time.perf_counter() - self._began) / (self._done - self._start)
        return a_step * max(0, self._total - self._done)

    def _line(self, times: str) -> None:
        self._printed = time.perf_counter()
        steps = f"{self._done}" if self._total is None else f"{self._done}/{self._total}"
        figures = (f"{name} {value}" for name, value in self._figures.items())
        print(f"{self._description}: " + "  ".join(filter(None, [steps, times, *figures])), flush=True)


def _knows_its_width(terminal: Any) -> bool:
    try:
        return os.get_terminal_size(terminal.fileno()).columns > 0
    except (OSError, ValueError):
        return False


def _clock(seconds: float) -> str:
    """Return h:mm:ss."""
    return str(timedelta(seconds=round(seconds)))
