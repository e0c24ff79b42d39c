"""Time and peak memory of a forward against tokens, batch and keep rate: dense, EViT, and the plain EViT.

    python benchmarks/growth.py --output benchmarks/results/growth-cpu
    python benchmarks/growth.py --device cuda --output benchmarks/results/growth-cuda

Plain is EViT as it is usually written, with an attention map (plain_evit.py).

Memory is measured of the first forward of a process of its own, fresh: the most that is resident during it,
beyond what is resident before it, which are weights and libraries. For that, malloc is told to give back at
once what is freed. Time is measured of all models of a size in turns, forward by forward, each in another
process of its own; the median counts. On a GPU all is in one process: memory is what PyTorch's allocator gave
away during the first forward of a size, which is the same whatever was there before.

Tokens grow with the resolution of one image, the batch at the model's own resolution. Straight lines are
fitted to memory against tokens, and parabolas: what those have of N² is how much a model's memory is not
linear. The weights are random, which changes neither time nor memory.

On a GPU there is a time limit, 2.5 minutes by default: bfloat16 comes first, what does not fit is left out,
and the results say so. They are written after every group.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib.util
import json
import multiprocessing
import statistics
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from typing import Any

import benchmark_options
import torch
from growth_report import PATCH, fits, fits_table, plot, table, tokens
from operator_times.facts import commit, machine
from plain_evit import PlainEViT
from time_limit import Missing, in_time

from evit_ext._util.timing import Timed
from evit_ext.benchmark import Here, apart, memory_added, time_in_turns
from evit_ext.models.by_name import create_dense, create_evit
from evit_ext.training.precision import choose_precision

SIDES = (224, 320, 384, 448, 512, 768, 1024)  # 197 to 4,097 tokens
BATCHES = (1, 4, 16)
GPU_BATCHES = (1, 8, 64, 256)
GPU_MINUTES = 2.5
KINDS = (("dense", 1.0), ("EViT", 0.7), ("EViT", 0.5), ("plain EViT", 0.7))
LEAST = 3  # forwards that are timed in any case
SMALL = 64  # side of the image that libraries are set up with, before memory is measured


@dataclass(frozen=True)
class Setup:
    """What a process measures."""

    model: str
    kind: str
    keep_rate: float
    side: int
    batch: int
    precision: str
    device: str
    threads: int


@dataclass(frozen=True)
class Group:
    """The models of one size, batch and precision, which take turns."""

    setups: list[Setup]

    def __str__(self) -> str:
        first = self.setups[0]
        sizes = f"{tokens(first.side)} tokens, batch {first.batch}, {first.precision}"
        return f"{sizes}, {len(self.setups)} models"


def create(setup: Setup) -> torch.nn.Module:
    """Return the model, in eval mode, on its device."""
    name = f"deit_{setup.model}"
    if setup.kind == "EViT":
        model = create_evit(name, keep_rate=setup.keep_rate, img_size=setup.side)
    else:
        model = create_dense(name, img_size=setup.side)
        if setup.kind == "plain EViT":
            model = PlainEViT(model, setup.keep_rate)
    return model.to(setup.device).eval()


def forward(setup: Setup) -> Callable[[], None]:
    """Return what runs the model once, without gradients."""
    device = torch.device(setup.device)
    dtype = choose_precision(device, setup.precision).dtype
    model = create(setup).to(dtype)
    images = torch.randn(setup.batch, 3, setup.side, setup.side, device=device, dtype=dtype)

    def run() -> None:
        with torch.inference_mode():
            model(images)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return run


def work(setup: Setup, line: Connection) -> None:
    """Be a process that measures memory: send the bytes that its first forward adds, or None."""
    torch.set_num_threads(setup.threads)
    torch.manual_seed(0)
    _give_back_what_is_freed()
    forward(replace(setup, side=SMALL, batch=1))()
    line.send(memory_added(forward(setup), setup.device))


def _give_back_what_is_freed() -> None:
    """Let malloc map every larger buffer by itself, so that what is freed is no longer resident.

    Otherwise it keeps and cuts up what is freed as it happens, which moved the figures by up to a half.
    """
    m_mmap_threshold = -3
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(m_mmap_threshold, 64 * 1024)


def memory(setup: Setup) -> int | None:
    """Return the bytes that a forward adds, of a process of its own."""
    # Forked from one that has imported what is needed and computed nothing: fresh, and soon there.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["evit_ext.benchmark", "timm"])
    line, other = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(setup, other))
    process.start()
    other.close()
    try:
        return line.recv()  # type: ignore[no-any-return]
    except EOFError:
        raise RuntimeError(f"the process that measured {setup} has ended; it says why above") from None
    finally:
        process.join()


def in_this_process(setups: list[Setup]) -> tuple[dict[str, Here], list[int | None]]:
    """Return the calls, and the bytes that the first of each adds, where PyTorch's allocator counts them."""
    calls, added = {}, []
    for setup in setups:
        forward(replace(setup, side=SMALL, batch=1))()  # which leaves what libraries keep
        run = forward(setup)
        added.append(memory_added(run, setup.device))
        calls[str(setup)] = Here(run, setup.device)
    return calls, added


def measure(setups: list[Setup], seconds: float) -> list[dict[str, Any]]:
    """Return a row for each setup, timed in turns, for so many seconds together but LEAST times each."""
    with contextlib.ExitStack() as stack:
        calls: Mapping[str, Timed]
        if setups[0].device == "cpu":
            added = [memory(setup) for setup in setups]
            calls = stack.enter_context(apart({str(setup): (forward, (setup,)) for setup in setups}))
        else:
            calls, added = in_this_process(setups)
        times = time_in_turns(calls, seconds, LEAST, warm_up=1)
    return [
        {
            **asdict(setup),
            "tokens": tokens(setup.side),
            "milliseconds": 1e3 * statistics.median(taken),
            "calls": len(taken),
            "peak_memory": peak,
        }
        for setup, taken, peak in zip(setups, times.values(), added, strict=True)
    ]


def groups(options: argparse.Namespace) -> list[Group]:
    """Return what is measured, in order."""
    sides = options.img_size or ([224, 448, 512] if options.quick else list(SIDES))
    on_gpu = options.device == "cuda"
    batches = options.batch or ([1] if options.quick else list(GPU_BATCHES if on_gpu else BATCHES))
    both = ["bfloat16", "float32"] if on_gpu else ["float32", "bfloat16"]
    precisions = options.precision or (both[:1] if options.quick else both)
    sizes = [(side, 1) for side in sides] + [(min(sides), batch) for batch in batches if batch != 1]
    common = {"device": options.device, "threads": torch.get_num_threads()}
    return [
        Group(
            [
                Setup(options.model, kind, keep_rate, side, batch, precision, **common)
                for kind, keep_rate in KINDS
                if not options.quick or keep_rate != 0.5
            ]
        )
        for precision in precisions
        for side, batch in sizes
    ]


def parse() -> argparse.Namespace:
    parser = benchmark_options.parser(__doc__, GPU_MINUTES)
    parser.add_argument(
        "--img-size",
        type=int,
        nargs="+",
        help=f"of square images, multiples of {PATCH} (default: {' '.join(map(str, SIDES))})",
    )
    parser.add_argument(
        "--batch", type=int, nargs="+", help="at the smallest size (default: 1 4 16; on a GPU 1 8 64 256)"
    )
    parser.add_argument("--precision", nargs="+", choices=["float32", "bfloat16"], help="default: both")
    parser.add_argument(
        "--seconds",
        type=float,
        help="for each group of rows, but at least 3 forwards (default: 4; --quick and on a GPU 2)",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="three sizes, batch 1, float32 (on a GPU bfloat16), keep rate 0.7",
    )
    options = benchmark_options.parse(parser, GPU_MINUTES)
    for side in options.img_size or ():
        if side < PATCH or side % PATCH:
            parser.error(f"--img-size must be multiples of {PATCH}, got {side}")
    return options


def main() -> int:
    options = parse()
    commit()
    on_gpu = options.device == "cuda"
    seconds = options.seconds or (2.0 if options.quick or on_gpu else 4.0)
    rows: list[dict[str, Any]] = []

    def save(missing: Missing) -> None:
        if options.output:
            write(options, rows, missing)

    def measure_group(group: Group) -> None:
        rows.extend(measure(group.setups, seconds))

    missing = in_time(groups(options), measure_group, options.minutes, lambda _: seconds + 10.0, save)
    print(f"\n{summary(rows, missing)}")
    save(missing)
    if options.output:
        if rows and importlib.util.find_spec("matplotlib") is not None:
            plot(rows, options.output.with_suffix(".png"), options.device.upper())
        else:
            print("no plot: " + ("matplotlib is not installed" if rows else "nothing was measured"))
    return 1 if missing.failures else 0


def summary(rows: list[dict[str, Any]], missing: Missing) -> str:
    """Return both tables in Markdown, what their columns are, and what was left out or failed."""
    return (
        "ms: median of the forwards, which take turns. MiB: what the first forward needs at its peak "
        "beyond what is there before it, on the CPU in a fresh process. A dash: not measured.\n\n"
        f"{table(rows)}\nMemory and time against the tokens N of one image. Farthest from the line: of all "
        "sizes, the largest distance between measured memory and the straight line a + b · N, in percent of "
        "what was measured. N²: the share of c · N² in the parabola a + b · N + c · N². N^: the power that "
        f"fits the larger half of the sizes best.\n\n{fits_table(fits(rows))}"
        + (f"\n{missing}\n" if str(missing) else "")
    )


def write(options: argparse.Namespace, rows: list[dict[str, Any]], missing: Missing) -> None:
    """OUTPUT.json and OUTPUT.md."""
    options.output.parent.mkdir(parents=True, exist_ok=True)
    facts = machine(options.device)
    contents = {"machine": facts, **asdict(missing), "rows": rows, "fits": fits(rows)}
    options.output.with_suffix(".json").write_text(json.dumps(contents, indent=1) + "\n")
    heading = f"# Growth of DeiT-{options.model[0].upper()}'s time and memory\n\n"
    heading += "".join(f"- {key}: {fact}\n" for key, fact in facts.items())
    options.output.with_suffix(".md").write_text(f"{heading}\n{summary(rows, missing)}")


if __name__ == "__main__":
    sys.exit(main())
