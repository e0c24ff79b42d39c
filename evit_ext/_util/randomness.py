"""Random numbers that follow from what they are for: the seed of the run, the step, the sample.

A generator that is carried along ties what is drawn to all that was drawn before: to the number of processes,
of loader workers, to where a run was interrupted. Here every piece of work gets generators of its own, seeded
from its name, so that neither matters.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch

_MASK = 2**64 - 1


def derive_seed(*keys: int) -> int:
    """Return a seed in [0, 2**63) for a piece of work that has these numbers.

    SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) used as a hash: neighbouring keys give unrelated seeds.

    Args:
        keys: any ints, such as the run's seed, the epoch and a sample's position; their order counts.
    """
    state = len(keys)
    for key in keys:
        state = _mix((state ^ key) & _MASK)
    return state >> 1


def _mix(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


@contextmanager
def seeded(seed: int, device: torch.device | str | None = None) -> Iterator[None]:
    """Seed torch's, NumPy's and Python's global generators from `seed`; afterwards they are as they were.

    Args:
        seed: in [0, 2**63), see :func:`derive_seed`.
        device: a CUDA device whose generator is seeded, too.
    """
    device = None if device is None else torch.device(device)
    cuda = device is not None and device.type == "cuda"
    python, numpy_state, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    device_state = torch.cuda.get_rng_state(device) if cuda and device is not None else None
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    if cuda and device is not None:
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy_state)
        torch.set_rng_state(cpu)
        if device_state is not None and device is not None:
            torch.cuda.set_rng_state(device_state, device)


def random_state() -> dict[str, Any]:
    """Return the states of all random generators of this process: torch's, NumPy's and Python's."""
    name, keys, position, has_gauss, gauss = cast(Any, np.random.get_state(legacy=True))
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": (str(name), keys.tolist(), int(position), int(has_gauss), float(gauss)),
        "python": random.getstate(),
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Set the random generators to what :func:`random_state` returned."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        # A machine with fewer GPUs than that of the checkpoint takes those that it has.
        torch.cuda.set_rng_state_all(state["cuda"][: torch.cuda.device_count()])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
