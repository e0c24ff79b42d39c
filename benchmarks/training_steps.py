"""Time training steps, and their memory, by keep rate, batch, resolution and number of processes.

    python benchmarks/training_steps.py --output benchmarks/results/training-scaling-cpu
    python benchmarks/training_steps.py --device cuda

On the CPU, DeiT-Ti, each process with one thread; several are joined by gloo and DistributedDataParallel.
Every configuration has processes of its own, which stay, so that its peak memory is its own, and which take
turns, step after step, so that what else happens on the machine happens to all of them; the median step
counts. A step is forward, backward and AdamW on random images, in float32, nothing loaded: see the Trainer
for what else a run does. Of several processes the slowest counts, and each also makes steps without adding up
gradients, which tells what that takes. On a GPU, DeiT-S in bfloat16 (autocast), one process for each
configuration; peak memory is what PyTorch's allocator gave out.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from operator_times.facts import machine
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import evit_ext
from evit_ext import models
from evit_ext._util.memory import peak_memory

WARM_UP = 2


@dataclass(frozen=True)
class Setup:
    """What is measured; `batch` is that of one process."""

    keep_rate: float = 0.7
    batch: int = 16
    img_size: int = 160
    processes: int = 1


SETUPS = (
    Setup(keep_rate=1.0),
    Setup(),
    Setup(keep_rate=0.5),
    Setup(batch=8),
    Setup(batch=32),
    Setup(img_size=112),
    Setup(img_size=224),
    Setup(keep_rate=1.0, processes=2),
    Setup(processes=2),
    Setup(keep_rate=0.5, processes=2),
)
GPU_SETUPS = (
    Setup(keep_rate=1.0, batch=256, img_size=224),
    Setup(batch=256, img_size=224),
    Setup(keep_rate=0.5, batch=256, img_size=224),
    Setup(batch=64, img_size=224),
    Setup(batch=64, img_size=448),
)


class Step:
    """A model, its optimizer and a batch, in this process."""

    def __init__(self, name: str, setup: Setup, device: str = "cpu") -> None:
        torch.set_num_threads(1)
        torch.manual_seed(0)
        self.device = torch.device(device)
        self.before = peak_mib(self.device)
        model = getattr(models, name)(keep_rate=setup.keep_rate, img_size=setup.img_size)
        self.gmacs = evit_ext.count_macs(model) / 1e9
        self.gradient_mib = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20
        model.to(self.device)
        self.optimizer = torch.optim.AdamW(model.parameters())
        self.model: nn.Module = DistributedDataParallel(model) if setup.processes > 1 else model
        self.images = torch.randn(setup.batch, 3, setup.img_size, setup.img_size, device=self.device)
        self.labels = torch.arange(setup.batch, device=self.device)

    def run(self, together: bool) -> float:
        """Make a step; returns its seconds. Not `together`, processes keep their gradients to themselves."""
        start = time.perf_counter()
        if together or not isinstance(self.model, DistributedDataParallel):
            self._run()
        else:
            with self.model.no_sync():
                self._run()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def _run(self) -> None:
        self.optimizer.zero_grad()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            loss = nn.functional.cross_entropy(self.model(self.images), self.labels)
        loss.backward()
        self.optimizer.step()


def peak_mib(device: torch.device) -> float:
    """Return the most memory that this process has had: main memory, or of the GPU."""
    return peak_memory(device) / 2**20


def work(name: str, setup: Setup, device: str) -> None:
    """Be a process of a setup: answer each line on stdin with one on stdout."""
    if setup.processes > 1:
        dist.init_process_group("gloo")
    step = Step(name, setup, device)
    facts = {"before_mib": step.before, "gmacs": step.gmacs, "gradient_mib": step.gradient_mib}
    print(json.dumps(facts), flush=True)
    for line in sys.stdin:
        command = line.strip()
        answer = peak_mib(step.device) if command == "memory" else step.run(command == "together")
        print(json.dumps(answer), flush=True)
    if setup.processes > 1:
        dist.destroy_process_group()


class Workers:
    """The processes of a setup, seen from outside."""

    def __init__(self, name: str, setup: Setup, device: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._processes = []
        for rank in range(setup.processes):
            meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank)}
            meeting |= {"WORLD_SIZE": str(setup.processes), "OMP_NUM_THREADS": "1"}
            command = [sys.executable, __file__, "--model", name, "--device", device]
            command += ["--work", json.dumps(asdict(setup))]
            self._processes.append(
                subprocess.Popen(
                    command,
                    env={**os.environ, **meeting},
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )
        self.facts = self._answers()[0]

    def ask(self, command: str) -> float:
        """Return the largest answer of the processes."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(command + "\n")
            process.stdin.flush()
        return max(self._answers())

    def close(self) -> None:
        for process in self._processes:
            process.communicate(timeout=60)

    def _answers(self) -> list[Any]:
        lines = []
        for process in self._processes:
            assert process.stdout is not None
            lines.append(process.stdout.readline())
        if not all(lines):
            raise RuntimeError("a process that was to be measured has ended; it says why above")
        return [json.loads(line) for line in lines]


def measure(name: str, setups: tuple[Setup, ...], rounds: int, device: str = "cpu") -> list[dict[str, Any]]:
    """A row for each setup: medians over the rounds, in which all take turns."""
    everyone = [(setup, Workers(name, setup, device)) for setup in setups]
    times: dict[tuple[Setup, str], list[float]] = {}
    for number in range(WARM_UP + rounds):
        for setup, workers in everyone:
            for command in ("together", "apart") if setup.processes > 1 else ("together",):
                seconds = workers.ask(command)
                if number >= WARM_UP:
                    times.setdefault((setup, command), []).append(seconds)
    rows = []
    for setup, workers in everyone:
        step = statistics.median(times[setup, "together"])
        apart = times.get((setup, "apart"))
        rows.append(
            {
                "model": name,
                **asdict(setup),
                **workers.facts,
                "step_seconds": step,
                "fastest_seconds": min(times[setup, "together"]),
                "gradients_seconds": step - statistics.median(apart) if apart else None,
                "images_per_second": setup.batch * setup.processes / step,
                "peak_mib": workers.ask("memory"),
            }
        )
        workers.close()
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| processes | keep rate | images of a process | pixels | GMACs | step: ms (fastest) | images/s "
        "| of it gradients: ms | peak memory: MiB | of it after the imports |",
        "|" + "---|" * 10,
    ]
    for row in rows:
        gradients = row["gradients_seconds"]
        cells = [
            f"{row['processes']}",
            f"{row['keep_rate']:g}",
            f"{row['batch']}",
            f"{row['img_size']}",
            f"{row['gmacs']:.3f}",
            f"{1e3 * row['step_seconds']:.0f} ({1e3 * row['fastest_seconds']:.0f})",
            f"{row['images_per_second']:.1f}",
            "–" if gradients is None else f"{1e3 * gradients:.0f}",
            f"{row['peak_mib']:.0f}",
            f"{row['peak_mib'] - row['before_mib']:.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def load() -> str:
    return " ".join(f"{average:.1f}" for average in os.getloadavg())


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--model", help="of evit_ext.models (default: deit_tiny; on a GPU deit_small)")
    parser.add_argument("--rounds", type=int, default=9, help="timed steps a row (default: 9)")
    parser.add_argument("--output", type=Path, help="write OUTPUT.json and OUTPUT.md as well")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    on_gpu = arguments.device == "cuda"
    name = arguments.model or ("deit_small" if on_gpu else "deit_tiny")
    if arguments.work:
        work(name, Setup(**json.loads(arguments.work)), arguments.device)
        return 0
    if on_gpu and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU: torch.cuda.is_available() is False")
    before = load()
    rows = measure(name, GPU_SETUPS if on_gpu else SETUPS, arguments.rounds, arguments.device)
    facts = machine(arguments.device)
    text = f"{name}, {'bfloat16' if on_gpu else 'float32'}, AdamW, medians of {arguments.rounds} steps that "
    text += "take turns."
    if not on_gpu:
        averages = f"{before} before, {load()} after; the benchmark itself is 1 to 2 of the latter"
        facts |= {"threads": "1 of each process", "cores": os.cpu_count(), "load averages": averages}
        text += (
            f" Gradients: {rows[0]['gradient_mib']:.1f} MiB; what adding them up takes is the difference of "
            "two medians, of steps with it and without. On one machine, through its memory: no network. "
            "Nothing here was measured on a GPU."
        )
    text += f"\n\n{table(rows)}"
    print(text)
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        everything = {"machine": facts, "rows": rows}
        arguments.output.with_suffix(".json").write_text(json.dumps(everything, indent=1) + "\n")
        heading = f"# Training steps on {'a GPU' if on_gpu else 'the CPU'}\n\n"
        heading += "".join(f"- {name}: {fact}\n" for name, fact in facts.items())
        arguments.output.with_suffix(".md").write_text(f"{heading}\n{text}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
