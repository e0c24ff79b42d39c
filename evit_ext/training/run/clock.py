"""How long a run has taken, including the time before it was interrupted."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager


class RunClock:
    """Measures the seconds of a run, and how many of them were training rather than evaluation.

    It does not run until :meth:`start`. :meth:`load_state` adds the time before an interruption.
    """

    def __init__(self) -> None:
        self._before = self._training_before = 0.0
        self._start: float | None = None
        self._training_start: float | None = None

    def start(self) -> None:
        """Start the clock."""
        self._start = time.perf_counter()

    @contextmanager
    def training(self) -> Iterator[None]:
        """Count the time in the context as training as well; :meth:`state` may be called inside it."""
        self._training_start = time.perf_counter()
        try:
            yield
        finally:
            self._training_before, self._training_start = self.training_seconds, None

    @property
    def seconds(self) -> float:
        """Seconds of the run so far."""
        return self._before + _since(self._start)

    @property
    def training_seconds(self) -> float:
        """Seconds of training so far, without evaluation."""
        return self._training_before + _since(self._training_start)

    def state(self) -> dict[str, float]:
        """Return the times, for a checkpoint."""
        return {"seconds": self.seconds, "training_seconds": self.training_seconds}

    def load_state(self, state: Mapping[str, float]) -> None:
        """Continue from what :meth:`state` returned; other entries of a checkpoint are ignored."""
        self._before, self._training_before = state["seconds"], state["training_seconds"]


def _since(start: float | None) -> float:
    return 0.0 if start is None else time.perf_counter() - start
