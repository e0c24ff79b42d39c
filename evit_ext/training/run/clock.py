"""How long a run has taken, over all the times that it was resumed."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager


class RunClock:
    """The seconds that a run has taken, and those of them that went into training rather than evaluation.

    It stands still until :meth:`start`. What was counted before a run was interrupted comes back with
    :meth:`load_state`.
    """

    def __init__(self) -> None:
        self._before = self._training_before = 0.0
        self._start: float | None = None
        self._training_start: float | None = None

    def start(self) -> None:
        """Count from now on."""
        self._start = time.perf_counter()

    @contextmanager
    def training(self) -> Iterator[None]:
        """Count the time in the context as training, too; so does a :meth:`state` that is taken inside it."""
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
        """Return what a checkpoint needs."""
        return {"seconds": self.seconds, "training_seconds": self.training_seconds}

    def load_state(self, state: Mapping[str, float]) -> None:
        """Go on from what :meth:`state` returned; other entries of a checkpoint are ignored."""
        self._before, self._training_before = state["seconds"], state["training_seconds"]


def _since(start: float | None) -> float:
    return 0.0 if start is None else time.perf_counter() - start
