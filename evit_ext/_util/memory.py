"""Memory in use: the most that a process had, and what a call needs beyond what was in use before it."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import resource
import sys
from collections.abc import Callable
from pathlib import Path

import torch


def memory_added(call: Callable[[], object], device: torch.device | str = "cpu") -> int | None:
    """Make a call and return the peak bytes in use during it, beyond those in use before it.

    This counts activations, and gradients in training, but neither weights nor memory of other models in the
    process. On the CPU it counts resident pages, whether PyTorch or a library allocated them. That is too
    large by about a page per buffer, and too small by any memory that a library kept from earlier calls. On a
    GPU it counts what PyTorch's allocator handed out.

    Args:
        call: the call to measure; its result is dropped.
        device: the device it computes on.

    Returns:
        The bytes; None on the CPU of systems other than Linux, which cannot reset a process's peak. The call
        is made in any case.
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    resident = _count_anew()
    call()
    return None if resident is None else max(0, peak_memory(device) - resident)


def peak_memory(device: torch.device) -> int:
    """Return the most memory that was in use, in bytes: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # getrusage says at least what the process that started this one had.
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _count_anew() -> int | None:
    """Reset the peak of this process to what is resident now, and return that in bytes."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        # Otherwise memory that malloc has kept could be used again without being counted.
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError, ValueError):
        return None
