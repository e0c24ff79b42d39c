"""The processes that train together, and the messages they exchange besides gradients."""

from __future__ import annotations

import datetime
import gc
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from evit_ext._util.messages import shown
from evit_ext.training.launcher import launched
from evit_ext.training.waiting import told


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together.

    Attributes:
        rank: its number, from 0.
        world_size: how many there are.
        local_rank: its number on this machine, from 0.
        device: what it computes on.
        control: the group for flags and figures: gloo, on the CPU, so that nothing waits for a GPU; None if
            there is only this process.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    device: torch.device = torch.device("cpu")
    control: Any = None

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Return the sums over all processes, in float64; every process must call it, with as many values.

        Raises:
            ConnectionError: another process has ended or did not respond in time. Other methods raise it,
                too.
        """
        if self.control is None:
            return [float(value) for value in values]
        sums = torch.tensor(values, dtype=torch.float64)
        group = self._group()
        with _talking(self.rank, self.world_size):
            dist.all_reduce(sums, group=group)
        return sums.tolist()

    def gather(self, value: Any) -> list[Any]:
        """Return every process' `value`, by rank; every process must call it.

        Values are pickled and sent between the processes of a run, which trust each other; keep them small.
        """
        if self.control is None:
            return [value]
        values: list[Any] = [None] * self.world_size
        group = self._group()
        with _talking(self.rank, self.world_size):
            dist.all_gather_object(values, value, group=group)
        return values

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.control is not None:
            group = self._group()
            with _talking(self.rank, self.world_size):
                dist.barrier(group=group)

    def _group(self) -> Any:
        if self.control is _LEFT:
            raise RuntimeError("the processes have left each other: join() has ended")
        return self.control


ALONE = Ranks()

#: Stands for the control group of a process that has left.
_LEFT = object()


@contextmanager
def join(device: str = "auto", timeout: float = 1800.0) -> Iterator[Ranks]:
    """Join the other processes that the launcher (torchrun, srun) started; without a launcher, run alone.

    Args:
        device: "auto" (the GPU of the local rank if there is one, else the CPU), "cpu" or "cuda".
        timeout: seconds after which a process that waits for another gives up.

    Raises:
        ValueError: the launcher's variables make no sense, or there is no such device.
        ConnectionError: the processes did not meet.
    """
    place = launched()
    rank, world_size, local_rank = place or (0, 1, 0)
    chosen = _device(device, local_rank)
    if place is None or world_size == 1:
        yield Ranks(device=chosen)
        return
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ValueError(
            f"{' and '.join(missing)} must say where the {world_size} processes meet, the machine of rank 0 "
            "and a free port of it; torchrun sets them, srun does not"
        )
    limit = datetime.timedelta(seconds=timeout)
    on_gpu = chosen.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(chosen)
    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    with _talking(rank, world_size), told(f"all {world_size} processes to meet at {where}"):
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            rank=rank,
            world_size=world_size,
            timeout=limit,
            device_id=chosen if on_gpu else None,
        )
        control = dist.new_group(backend="gloo", timeout=limit)
    here = Ranks(rank, world_size, local_rank, chosen, control)
    del control
    try:
        yield here
    except BaseException:
        # NCCL's would wait for work that the others may never do their part of; the process ends anyway.
        if not on_gpu:
            _leave(here)
        raise
    _leave(here)


def _leave(here: Ranks) -> None:
    """Leave the other processes and release the groups, so that gloo's threads end.

    A thread of gloo that frees a tensor while Python shuts down aborts the process after all its work, and
    the launcher then reports the run as failed. This was seen once, on a busy machine.
    """
    dist.destroy_process_group()
    # Not None, with which it would be alone: collectives of a group that is gone raise.
    object.__setattr__(here, "control", _LEFT)
    gc.collect()  # models hold groups, too


@contextmanager
def _talking(rank: int, world_size: int) -> Iterator[None]:
    """Explain torch's errors about another process that does not answer."""
    try:
        yield
    except RuntimeError as error:
        raise ConnectionError(
            f"rank {rank} of {world_size} lost another process of the run, which stopped or did not answer "
            f"in time: {error}"
        ) from error


def is_lost(error: BaseException) -> bool:
    """Return whether an error says that another process is gone, as those of torch's collectives do."""
    if isinstance(error, (ConnectionError, dist.DistError)):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in ("gloo", "NCCL"))


def _device(name: str, local_rank: int) -> torch.device:
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device must be 'auto', 'cpu' or 'cuda', got {shown(name)}")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cpu" or (name == "auto" and not count):
        return torch.device("cpu")
    if not count:
        raise ValueError("there is no GPU that PyTorch can use, for device 'cuda'")
    if local_rank >= count:
        raise ValueError(
            f"local rank {local_rank} has no GPU: this process sees {count}, and each needs its own; "
            "under Slurm, ask for GPUs by node, not by task"
        )
    return torch.device("cuda", local_rank)
