"""Which of the processes that train together this one is, as their launcher says."""

from __future__ import annotations

import os
from collections.abc import Mapping

# What a launcher sets: torchrun, or Slurm's srun with a task for each process.
_VARIABLES = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
)


def launched(environment: Mapping[str, str] | None = None) -> tuple[int, int, int] | None:
    """Return rank, world size and local rank from the launcher's variables; None without a launcher.

    Raises:
        ValueError: only some of a launcher's variables are set, or their values make no sense.
    """
    environment = os.environ if environment is None else environment
    for names in _VARIABLES:
        values = [environment.get(name) for name in names]
        # A shell inside a Slurm allocation has these variables, too, without having been launched by srun.
        if values[:2] == [None, None] or (
            names[1].startswith("SLURM") and "SLURM_STEP_ID" not in environment
        ):
            continue
        if None in values:
            missing = ", ".join(name for name, value in zip(names, values, strict=True) if value is None)
            raise ValueError(f"{missing} is not set: expected all of {', '.join(names)}, or none")
        try:
            rank, world_size, local_rank = (int(str(value)) for value in values)
        except ValueError:
            raise ValueError(f"expected numbers in {', '.join(names)}, got {values}") from None
        if not (0 <= rank < world_size and 0 <= local_rank < world_size):
            raise ValueError(
                f"expected {names[0]} and {names[2]} in [0, {names[1]}), got {rank}, {local_rank} and "
                f"{world_size}"
            )
        return rank, world_size, local_rank
    return None
