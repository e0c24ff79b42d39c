"""Ways to time a call that is repeated over several sets of inputs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, Protocol

import torch

#: Runs something on the inputs of a number.
Call = Callable[[int], Any]
#: Runs something many times; the mean seconds of one.
Timer = Callable[[], float]


class Clock(Protocol):
    """What `work.measure` needs of one."""

    def replayed(self, call: Call, count: int, repeats: int) -> Timer:
        """Time the device's work alone, without what Python and the launches take."""

    def called(self, call: Call, count: int, repeats: int) -> Timer:
        """Time the calls as they are made from Python."""


class WallClock:
    """Of the host: for devices that have ended their work when the call returns."""

    def replayed(self, call: Call, count: int, repeats: int) -> Timer:
        return self.called(call, count, repeats)

    def called(self, call: Call, count: int, repeats: int) -> Timer:
        def seconds() -> float:
            start = time.perf_counter()
            for number in range(repeats):
                call(number % count)
            return (time.perf_counter() - start) / repeats

        return seconds


class CudaClock:
    """Of the GPU: events around a CUDA graph of all the calls, or around the calls themselves.

    Everything runs on one stream of its own, on which the graphs are captured as well: the gradients of a
    forward pass run on the stream on which it ran.
    """

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()

    def replayed(self, call: Call, count: int, repeats: int) -> Timer:
        call(0)
        graph = torch.cuda.CUDAGraph()
        # Kept until its turn comes again: a result that is freed at once gives its memory to the next one,
        # whose writes then stay in the cache.
        results: list[Any] = [None] * count
        with torch.cuda.graph(graph, stream=self.stream):
            for number in range(repeats):
                results[number % count] = call(number % count)

        def replay() -> None:
            graph.replay()

        replay()
        return self._between_events(replay, repeats)

    def called(self, call: Call, count: int, repeats: int) -> Timer:
        def run() -> None:
            for number in range(repeats):
                call(number % count)

        return self._between_events(run, repeats)

    def _between_events(self, run: Callable[[], None], repeats: int) -> Timer:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

        def seconds() -> float:
            start.record(self.stream)
            run()
            end.record(self.stream)
            end.synchronize()
            return start.elapsed_time(end) / 1e3 / repeats

        return seconds


def interleaved(timers: dict[str, Timer], seconds: float) -> dict[str, float]:
    """Median seconds of each timer, in rounds in which each has one turn; at least five rounds."""
    times: dict[str, list[float]] = {name: [] for name in timers}
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < 5 or time.perf_counter() < end:
        for name, timer in timers.items():
            times[name].append(timer())
        rounds += 1
    return {name: statistics.median(values) for name, values in times.items()}
