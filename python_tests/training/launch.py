"""Starting a script in several processes, as torchrun does."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


def start(script: Path, world_size: int, *arguments: object) -> list[subprocess.Popen[str]]:
    """Start `world_size` processes that can meet, each with one thread."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    processes = []
    for rank in range(world_size):
        place = dict(zip(_VARIABLES, (str(rank), str(world_size), str(rank)), strict=True))
        processes.append(
            subprocess.Popen(
                [sys.executable, str(script), *map(str, arguments)],
                env={**inherited, **common, **place},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    return processes


def outputs(processes: list[subprocess.Popen[str]], timeout: float = 120.0) -> list[tuple[int, str, str]]:
    """Wait for the processes; return status, stdout and stderr of each, by rank. None is left running."""
    try:
        results = []
        for process in processes:
            printed, errors = process.communicate(timeout=timeout)
            results.append((process.returncode, printed, errors))
        return results
    finally:
        for process in processes:
            process.kill()


def run(script: Path, world_size: int, *arguments: object) -> list[str]:
    """Return what each process printed, by rank; all must have ended well."""
    results = outputs(start(script, world_size, *arguments))
    assert [status for status, *_ in results] == [0] * world_size, [errors for *_, errors in results]
    return [printed for _, printed, _ in results]
