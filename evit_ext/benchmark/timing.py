"""Timing calls that take turns, so that what else happens on the machine happens to all of them."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from typing import Protocol

import torch

from evit_ext.benchmark.memory import memory_added


class Timed(Protocol):
    """A call that can be made again and again."""

    def seconds(self) -> float:
        """Make the call; return how long it took."""

    def memory(self) -> int | None:
        """Make the call; return what :func:`evit_ext.benchmark.memory_added` says of it."""


class Here:
    """A call that is made in this process.

    Args:
        call: what is timed.
        device: what it computes on; on a GPU a call ends when its work has.
    """

    def __init__(self, call: Callable[[], object], device: torch.device | str = "cpu") -> None:
        self._call = call
        self._device = torch.device(device)

    def seconds(self) -> float:
        """Make the call; return how long it took."""
        self._synchronize()
        before = time.perf_counter()
        self._call()
        self._synchronize()
        return time.perf_counter() - before

    def memory(self) -> int | None:
        """Make the call; return the most bytes in use during it, beyond those before it."""
        return memory_added(self._call, self._device)

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def time_in_turns(
    calls: Mapping[str, Timed], seconds: float = 5.0, least: int = 5, warm_up: int = 2
) -> dict[str, list[float]]:
    """Time calls, one after another, round after round.

    Every call is made before, untimed. Each round has an order drawn at random, the same in every run, so
    that no call follows the same other one more often than chance has it.

    Args:
        calls: by name: :class:`Here`, or :class:`evit_ext.benchmark.Apart`.
        seconds: for all rounds together, but for the last one.
        least: rounds that are made in any case.
        warm_up: untimed rounds before them.

    Returns:
        For each name the seconds of its calls, in order; as many for each.

    Raises:
        ValueError: no call, or `least` is less than 1.
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
