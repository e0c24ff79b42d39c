"""How much memory a call needs beyond what is there before it."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
from collections.abc import Callable
from pathlib import Path

import torch

from evit_ext.training.summary import peak_memory


def memory_added(call: Callable[[], object], device: torch.device | str = "cpu") -> int | None:
    """Make a call; return the most bytes in use during it, beyond those in use before it.

    These are activations, and gradients in training: neither weights nor what other models in the process
    hold. On the CPU they are resident pages, whoever allocates them, PyTorch or a library, so that the figure
    is about a page per buffer too large, and too small by what a library kept of earlier calls for itself. On
    a GPU they are what PyTorch's allocator gave away.

    Args:
        call: what is measured; its result is dropped.
        device: what it computes on.

    Returns:
        None on the CPU where the system does not let a process have its peak counted anew: only Linux does.
        The call is made in any case.
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


def _count_anew() -> int | None:
    """Let the peak of this process begin at what is resident now, and return that, in bytes."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        # What was freed but kept by malloc would be used again unseen.
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError, ValueError):
        return None
