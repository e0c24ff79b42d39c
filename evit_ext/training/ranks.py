"""The processes that train together: who they are, and the little they tell each other besides gradients."""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

# What a launcher sets: torchrun, or Slurm's srun with a task for each process.
_VARIABLES = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
)


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together.

    Attributes:
        rank: its number, from 0.
        world_size: how many there are.
        local_rank: its number on this machine, from 0.
        device: what it computes on.
        control: the group for flags and figures: gloo, on the CPU, so that nothing waits for a GPU; None for
            a process that is alone.
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
        """Return the sums over all processes, in float64; every process must call it."""
        if self.control is None:
            return [float(value) for value in values]
        sums = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(sums, group=self.control)
        return sums.tolist()

    def gather(self, value: Any) -> list[Any]:
        """Return every process' `value`, by rank; every process must call it.

        Values are pickled between the processes of this run, which trust each other; not for large ones.
        """
        if self.control is None:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.control is not None:
            dist.barrier(group=self.control)


ALONE = Ranks()


def launched(environment: Mapping[str, str] | None = None) -> tuple[int, int, int] | None:
    """Return rank, world size and local rank as the launcher said; None where there was none.

    Raises:
        ValueError: only some of a launcher's variables are set, or one is not a number.
    """
    environment = os.environ if environment is None else environment
    for names in _VARIABLES:
        values = [environment.get(name) for name in names]
        # A shell inside a Slurm allocation has these variables, too, without having been launched by srun.
        if values[1] is None or (names[1].startswith("SLURM") and "SLURM_STEP_ID" not in environment):
            continue
        if None in values:
            missing = ", ".join(name for name, value in zip(names, values, strict=True) if value is None)
            raise ValueError(f"{names[1]} is set but not {missing}: expected all of {', '.join(names)}")
        try:
            rank, world_size, local_rank = (int(str(value)) for value in values)
        except ValueError:
            raise ValueError(f"expected numbers in {', '.join(names)}, got {values}") from None
        return rank, world_size, local_rank
    return None


@contextmanager
def join(device: str = "auto", timeout: float = 1800.0) -> Iterator[Ranks]:
    """Meet the other processes, as the launcher (torchrun, srun) says; alone without one.

    Args:
        device: "auto", the GPU of the local rank where there is one, else the CPU; or "cpu", "cuda".
        timeout: seconds after which a process that waits for another gives up.

    Raises:
        ValueError: the launcher's variables make no sense, or there is no such device.
    """
    place = launched()
    rank, world_size, local_rank = place or (0, 1, 0)
    chosen = _device(device, local_rank)
    if place is None or world_size == 1:
        yield Ranks(device=chosen)
        return
    limit = datetime.timedelta(seconds=timeout)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
        dist.init_process_group("nccl", rank=rank, world_size=world_size, timeout=limit, device_id=chosen)
        control = dist.new_group(backend="gloo", timeout=limit)
    else:
        dist.init_process_group("gloo", rank=rank, world_size=world_size, timeout=limit)
        control = dist.new_group(backend="gloo", timeout=limit)
    try:
        yield Ranks(rank, world_size, local_rank, chosen, control)
    finally:
        dist.destroy_process_group()


def _device(name: str, local_rank: int) -> torch.device:
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device must be 'auto', 'cpu' or 'cuda', got {name!r}")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cpu" or (name == "auto" and not count):
        return torch.device("cpu")
    if local_rank >= count:
        raise ValueError(
            f"local rank {local_rank} has no GPU: this machine has {count}; expected one process for each"
        )
    return torch.device("cuda", local_rank)
