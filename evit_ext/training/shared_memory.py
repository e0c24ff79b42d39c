"""Whether the memory through which workers hand over batches is large enough, before they start."""

from __future__ import annotations

import shutil
from pathlib import Path

_SHARED_MEMORY = Path("/dev/shm")
# Batches that a worker of torch's DataLoader prepares ahead.
_AHEAD = 2


def shared_memory_needed(workers: int, batch_bytes: int) -> int:
    """Return how many bytes of batches can wait at once: those of all workers, and the one in use."""
    return (_AHEAD * workers + 1) * batch_bytes if workers else 0


def shared_memory_free() -> int | None:
    """Return the free bytes of /dev/shm; None on systems without it."""
    return shutil.disk_usage(_SHARED_MEMORY).free if _SHARED_MEMORY.is_dir() else None


def check_shared_memory(
    workers: int,
    batch_bytes: int,
    way_out: str = "use --workers 0, or a smaller --micro-batch or --batch-size",
) -> None:
    """Raise ValueError unless the batches of all workers fit into /dev/shm; its message has the `way_out`.

    A worker that finds it full cannot tell the training, which would then wait for its batch without end.
    """
    free, needed = shared_memory_free(), shared_memory_needed(workers, batch_bytes)
    if free is not None and needed > free:
        raise ValueError(
            f"/dev/shm has {free / 2**20:.0f} MiB free, and {workers} workers hand over up to "
            f"{needed / 2**20:.0f} MiB of images through it: {way_out}, or make it larger (docker run "
            "--shm-size 2g)"
        )
