"""Timing calls in turns, so that other load on the machine affects all of them alike."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from typing import Protocol

import torch

from evit_ext._util.memory import memory_added


class Timed(Protocol):
    """A call that can be made repeatedly."""

    def seconds(self) -> float:
        """Make the call and return the seconds it took."""

    def memory(self) -> int | None:
        """Make the call and return its :func:`evit_ext.benchmark.memory_added`."""


class Here:
    """A call in this process.

    Args:
        call: the call to time.
        device: the device it computes on; on a GPU, a call ends when its work is done.
    """

    def __init__(self, call: Callable[[], object], device: torch.device | str = "cpu") -> None:
        self._call = call
        self._device = torch.device(device)

    def seconds(self) -> float:
        """Make the call and return the seconds it took."""
        self._synchronize()
        before = time.perf_counter()
        self._call()
        self._synchronize()
        return time.perf_counter() - before

    def memory(self) -> int | None:
        """Make the call and return the peak bytes in use during it, beyond those before it."""
        return memory_added(self._call, self._device)

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def time_in_turns(
    calls: Mapping[str, Timed], seconds: float = 5.0, least: int = 5, warm_up: int = 2
) -> dict[str, list[float]]:
    """Time calls one after another, round after round.

    Untimed rounds come first. Each round has a random order, the same in every run, so that no call follows
    another one more often than by chance.

    Args:
        calls: by name: :class:`Here` or :class:`evit_ext.benchmark.Apart`.
        seconds: for all rounds together, except the last one.
        least: minimum number of rounds.
        warm_up: number of untimed rounds before them.

    Returns:
        For each name the seconds of its calls in order; the same number for each.

    Raises:
        ValueError: there is no call, or `least` is less than 1.
    """
    if not calls or least < 1:
        raise ValueError(f"nothing to time: {len(calls)} calls, {least} rounds; each must be at least 1")
    for call in list(calls.values()) * warm_up:
        call.seconds()
    names = list(calls)
    times: dict[str, list[float]] = {name: [] for name in names}
    orders = random.Random(0)
    start = time.perf_counter()
    rounds = 0
    while rounds < least or time.perf_counter() - start < seconds:
        for name in orders.sample(names, len(names)):
            times[name].append(calls[name].seconds())
        rounds += 1
    return times
