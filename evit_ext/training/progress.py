"""Progress: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any

_SECONDS_BETWEEN_LINES = 15.0


class Progress:
    """Progress over `total` steps, with the latest values of some figures.

    On a terminal with tqdm installed it is tqdm's bar; otherwise lines on stdout, at most one every 15
    seconds and one at the end, so that a log file stays readable.

    Args:
        description: what is in progress.
        total: number of steps.
        enabled: False prints nothing.
    """

    def __init__(self, description: str, total: int, enabled: bool = True) -> None:
        self._description = description
        self._total = total
        self._enabled = enabled
        self._done = 0
        self._figures: dict[str, str] = {}
        self._bar: Any = None
        self._printed = time.perf_counter()
        if enabled and sys.stdout.isatty():
            try:
                from tqdm import tqdm
            except ImportError:
                return
            self._bar = tqdm(desc=description, total=total, file=sys.stdout, dynamic_ncols=True)

    def step(self, **figures: str) -> None:
        """One step is done; show the figures, as they are written."""
        self._done += 1
        self._figures = figures
        if self._bar is not None:
            self._bar.set_postfix(figures, refresh=False)
            self._bar.update()
        elif self._enabled and time.perf_counter() - self._printed >= _SECONDS_BETWEEN_LINES:
            self._line()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()
        elif self._enabled and self._done:
            self._line()

    def _line(self) -> None:
        self._printed = time.perf_counter()
        figures = "".join(f"  {name} {value}" for name, value in self._figures.items())
        print(f"{self._description}: {self._done}/{self._total}{figures}", flush=True)
