"""Timing calls that take turns, so that what else happens on the machine happens to all of them."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping

import torch


def time_in_turns(
    calls: Mapping[str, Callable[[], object]],
    device: torch.device | str = "cpu",
    seconds: float = 5.0,
    least: int = 5,
    warm_up: int = 2,
) -> dict[str, list[float]]:
    """Time calls, one after another, round after round.

    Every call is made before, untimed. Each round has an order drawn at random, the same in every run, so
    that no call follows the same other one more often than chance has it.

    Args:
        calls: by name.
        device: what they compute on; on a GPU a call ends when its work has.
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
    device = torch.device(device)
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    for call in list(calls.values()) * warm_up:
        call()
    names = list(calls)
    times: dict[str, list[float]] = {name: [] for name in names}
    orders = random.Random(0)
    start = time.perf_counter()
    rounds = 0
    while rounds < least or time.perf_counter() - start < seconds:
        for name in orders.sample(names, len(names)):
            synchronize()
            before = time.perf_counter()
            calls[name]()
            synchronize()
            times[name].append(time.perf_counter() - before)
        rounds += 1
    return times
