"""Runs of ``evit train`` in processes of their own, which start quickly and can be killed."""

from __future__ import annotations

import csv
import multiprocessing
import os
import resource
import shlex
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

# Children are forked from a process that has imported all this already.
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["evit_ext.cli.train", "evit_ext.training.run.run", "sklearn.datasets"])

#: A run of all that is random or has a state: the order, augmentation, mixup, drop path, EMA, the keep rate.
SMALL = shlex.split(
    "--model vit_tiny_patch16_224 --model-args patch_size=8 embed_dim=24 depth=4 num_heads=2 --img-size 32 "
    "--keep-rate 0.6 --keep-rate-end-epoch 2 --epochs 2 --batch-size 12 --lr 3e-3 --warmup-epochs 0.5 "
    "--mixup 0.4 --cutmix 1.0 --drop-path 0.2 --ema-decay 0.9 --auto-augment rand-m9-mstd0.5-inc1 "
    "--reprob 0.5 --clip-grad 1.0 --checkpoint-every 1 --log-every 1 --precision float32 --workers 0"
)


def start(
    folder: Path,
    arguments: Sequence[str],
    processes: int = 1,
    log: Path | None = None,
    largest_file: int | None = None,
) -> list[Any]:
    """Start ``evit train --output folder ...`` on so many processes.

    What they print goes to `log`; the system lets them write no file of more than `largest_file` bytes.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(processes):
        place = {"RANK": str(rank), "WORLD_SIZE": str(processes), "LOCAL_RANK": str(rank)}
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        command = ["train", "--output", str(folder), "--device", "cpu", *arguments]
        environment = {**place, **where} if processes > 1 else {}
        process = _processes.Process(target=_train, args=(command, environment, log, largest_file))
        process.start()
        started.append(process)
    return started


def processes_of(command: Sequence[str], processes: int, logs: Path) -> list[subprocess.Popen[bytes]]:
    """Start a command as so many processes that train together; what each prints goes to `logs`/RANK.log."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    started = []
    for rank in map(str, range(processes)):
        place = {"RANK": rank, "WORLD_SIZE": str(processes), "LOCAL_RANK": rank}
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        with (logs / f"{rank}.log").open("w") as log:
            started.append(
                subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **place, **where})
            )
    return started


def _train(
    command: list[str], environment: dict[str, str], log: Path | None, largest_file: int | None
) -> None:
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    if log is not None:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
    os.environ.update(environment)
    torch.set_num_threads(1)
    from evit_ext.cli import main

    sys.exit(main(command))


def wait(processes: Sequence[Any], seconds: float = 120) -> list[int]:
    """Return the exit statuses, negative for a signal."""
    for process in processes:
        process.join(seconds)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise TimeoutError(f"a run took more than {seconds} s")
    return [process.exitcode for process in processes]


def train(folder: Path, arguments: Sequence[str], processes: int = 1) -> str:
    """Train to the end; returns what was printed."""
    log = folder.with_name(f"{folder.name}.log")
    log.unlink(missing_ok=True)
    statuses = wait(start(folder, arguments, processes, log))
    text = log.read_text()
    assert statuses == [0] * processes, text
    return text


def assert_same_run(one: Path, other: Path) -> None:
    """Both runs ended with the same bits: weights, averages, optimizer, metrics."""
    for name in ("last.safetensors", "last_ema.safetensors", "best.safetensors"):
        first, second = load_file(one / name), load_file(other / name)
        for key, value in first.items():
            assert torch.equal(value, second[key]), (name, key)
        # The order of tensors and of what is said of them, too: `sha256sum` shows that runs are equal.
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    newest = [max((folder / "checkpoints").iterdir()) for folder in (one, other)]
    assert newest[0].name == newest[1].name
    first, second = (torch.load(path, weights_only=True) for path in newest)
    _assert_same(first["optimizer"], second["optimizer"], "optimizer")
    assert metrics(one) == metrics(other)


def _assert_same(one: Any, other: Any, place: str) -> None:
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), place
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), place
        for key in one:
            _assert_same(one[key], other[key], f"{place}.{key}")
    elif isinstance(one, (list, tuple)):
        for number, (first, second) in enumerate(zip(one, other, strict=True)):
            _assert_same(first, second, f"{place}.{number}")
    else:
        assert one == other, place


def metrics(folder: Path) -> list[dict[str, str]]:
    """Return the rows of metrics.csv, without what the clock says."""
    with (folder / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    clock = ("images_per_second", "seconds", "memory")
    return [{name: value for name, value in row.items() if not name.startswith(clock)} for row in rows]
