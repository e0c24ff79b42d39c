"""Time and peak memory of a forward against tokens, batch and keep rate: dense, EViT, and the plain EViT.

    python benchmarks/growth.py --output benchmarks/results/growth-cpu
    python benchmarks/growth.py --device cuda --output benchmarks/results/growth-cuda

Plain is EViT as it is usually written, with an attention map (plain_evit.py).

Memory is measured of the first forward of a process of its own, fresh: the most that is resident during it,
beyond what is resident before it, which are weights and libraries (on a GPU: what PyTorch's allocator gave
away). For that, malloc is told to give back at once what is freed. Time is measured of all models of a size
in turns, forward by forward, each in another process of its own (on a GPU all in one); the median counts.

Tokens grow with the resolution of one image, the batch at the model's own resolution. Straight lines are
fitted to memory against tokens, and parabolas: what those have of N² is how much a model's memory is not
linear. The weights are random, which changes neither time nor memory.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import math
import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from operator_times.facts import machine
from plain_evit import PlainEViT

from evit_ext.benchmark import Here, apart, memory_added, time_in_turns
from evit_ext.benchmark.timing import Timed
from evit_ext.models.by_name import create_dense, create_evit
from evit_ext.training.precision import choose_precision

PATCH = 16
SIDES = (224, 320, 384, 448, 512, 768, 1024)  # 197 to 4,097 tokens
BATCHES = (1, 4, 16)
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


def tokens(side: int) -> int:
    """Return patches of a square image, and the class token."""
    return (side // PATCH) ** 2 + 1


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


def measure(setups: list[Setup], seconds: float) -> list[dict[str, Any]]:
    """Return a row for each setup, timed in turns, for so many seconds together but LEAST times each."""
    added = [memory(setup) for setup in setups]
    with contextlib.ExitStack() as stack:
        calls: Mapping[str, Timed]
        if setups[0].device == "cpu":
            calls = stack.enter_context(apart({str(setup): (forward, (setup,)) for setup in setups}))
        else:
            calls = {str(setup): Here(forward(setup), setup.device) for setup in setups}
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


def name(row: dict[str, Any]) -> str:
    """Return a model's name in tables and plots."""
    return row["kind"] if row["kind"] == "dense" else f"{row['kind']} {row['keep_rate']:g}"


def fits(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return what memory and time are as functions of the tokens N, for each model and precision.

    `bytes_per_token` and `residual`, the largest distance of a measurement from the line as a share of the
    measurement, are of the straight line; `quadratic_share` is the share of the N² term, at the largest N, of
    the parabola, negative where it bends down. Both are fitted to relative errors. The exponents are of
    the powers of N that best fit the larger half of the sizes, in which what does not grow counts little.
    None where there are too few sizes or memory was not measured.
    """
    found = []
    for key in dict.fromkeys((name(row), row["precision"]) for row in rows):
        line = sorted(
            (row for row in rows if (name(row), row["precision"]) == key and row["batch"] == 1),
            key=lambda row: row["tokens"],
        )
        n = np.array([row["tokens"] for row in line], float)
        figures: dict[str, Any] = {"model": key[0], "precision": key[1], "sizes": len(n)}
        figures |= dict.fromkeys(("bytes_per_token", "residual", "quadratic_share", "memory_exponent"))
        large = slice(len(n) // 2, None)
        milliseconds = np.array([row["milliseconds"] for row in line])
        figures["time_exponent"] = _exponent(n[large], milliseconds[large])
        if len(n) > 3 and all(row["peak_memory"] for row in line):
            m = np.array([row["peak_memory"] for row in line], float)
            slope, offset = np.polyfit(n, m, 1, w=1 / m)
            curve = np.polyfit(n, m, 2, w=1 / m)
            figures["bytes_per_token"] = float(slope)
            figures["residual"] = float(np.max(np.abs(slope * n + offset - m) / m))
            figures["quadratic_share"] = float(curve[0] * n[-1] ** 2 / np.polyval(curve, n[-1]))
            figures["memory_exponent"] = _exponent(n[large], m[large])
        found.append(figures)
    return found


def _exponent(n: Any, values: Any) -> float | None:
    return float(np.polyfit(np.log(n), np.log(values), 1)[0]) if len(n) > 1 else None


def table(rows: list[dict[str, Any]]) -> str:
    """Return the measurements in Markdown."""
    lines = [
        "| model | precision | batch | pixels | tokens | ms | calls | MiB |",
        "|" + "---|" * 8,
    ]
    for row in rows:
        memory = "–" if row["peak_memory"] is None else f"{row['peak_memory'] / 2**20:.1f}"
        cells = [name(row), row["precision"], row["batch"], row["side"], row["tokens"]]
        cells += [f"{row['milliseconds']:.1f}", row["calls"], memory]
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def fits_table(found: list[dict[str, Any]]) -> str:
    """Return the fits in Markdown."""
    lines = [
        "| model | precision | KiB per token | farthest from the line | N² at the most tokens "
        "| memory grows as N^ | time grows as N^ |",
        "|" + "---|" * 7,
    ]
    for fit in found:

        def cell(key: str, form: str, scale: float = 1.0, fit: dict[str, Any] = fit) -> str:
            return "–" if fit[key] is None else format(fit[key] * scale, form)

        cells = [fit["model"], fit["precision"], cell("bytes_per_token", ".1f", 2**-10)]
        cells += [cell("residual", ".1%"), cell("quadratic_share", ".1%")]
        cells += [cell("memory_exponent", ".2f"), cell("time_exponent", ".2f")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(rows: list[dict[str, Any]], path: Path, device: str) -> None:
    """Draw time and memory against tokens, and against the batch, of the first precision, log-log."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    precision = rows[0]["precision"]
    rows = [row for row in rows if row["precision"] == precision]
    smallest = min(row["side"] for row in rows)
    against = [("tokens", [row for row in rows if row["batch"] == 1])]
    batches = [row for row in rows if row["side"] == smallest]
    if len({row["batch"] for row in batches}) > 1:
        against.append(("batch", batches))
    figure, axes = plt.subplots(len(against), 2, figsize=(12, 4.6 * len(against)), squeeze=False)
    for line_of_axes, (key, shown) in zip(axes, against, strict=True):
        for axis, (value, label) in zip(
            line_of_axes,
            (("milliseconds", "ms of a forward"), ("peak_memory", "MiB that a forward adds, at its peak")),
            strict=True,
        ):
            _panel(axis, shown, key, value)
            ticks = sorted({row[key] for row in shown})
            axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks], rotation=45 if key == "tokens" else 0)
            axis.minorticks_off()
            axis.set_xlabel("tokens of one image" if key == "tokens" else f"batch, {tokens(smallest)} tokens")
            axis.set_ylabel(label)
            axis.set_title(f"{label.split(' ')[0]} against {key}, {precision}, {device}")
            axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _panel(axis: Any, rows: list[dict[str, Any]], key: str, value: str) -> None:
    scale = 2**-20 if value == "peak_memory" else 1.0
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    styles = {"dense": ("gray", "s"), "EViT": ("C0", "o"), "plain EViT": ("C1", "^")}
    for model in dict.fromkeys(map(name, rows)):
        line = [row for row in rows if name(row) == model and row[value]]
        if not line:
            continue
        color, marker = styles[line[0]["kind"]]
        lighter = line[0]["keep_rate"] < 0.6
        axis.plot(
            [row[key] for row in line],
            [row[value] * scale for row in line],
            color=color,
            marker=marker,
            markersize=10 if model == "dense" else 6,  # below the others, which it may coincide with
            linestyle="--" if lighter else "-",
            markerfacecolor="white" if lighter else color,
            label={"dense": "dense, timm", "EViT": f"{model}, evit_ext"}.get(line[0]["kind"], model),
        )
    low, high = axis.get_ylim()
    if high / low < 20:  # otherwise labels at powers of ten only would be one or two
        ticks = [step * 10.0**power for power in range(-2, 7) for step in (1, 2, 5)]
        ticks = [tick for tick in ticks if low <= tick <= high]
        axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    else:
        powers = range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)
        axis.set_yticks([10.0**power for power in powers], [f"{10.0**power:,g}" for power in powers])
    axis.legend(fontsize="small")


def groups(options: argparse.Namespace) -> list[list[Setup]]:
    """Return what takes turns: the models of one size, batch and precision."""
    sides = options.img_size or ([224, 448, 512] if options.quick else list(SIDES))
    batches = options.batch or ([1] if options.quick else list(BATCHES))
    precisions = options.precision or (["float32"] if options.quick else ["float32", "bfloat16"])
    sizes = [(side, 1) for side in sides] + [(min(sides), batch) for batch in batches if batch != 1]
    common = {"device": options.device, "threads": torch.get_num_threads()}
    return [
        [
            Setup(options.model, kind, keep_rate, side, batch, precision, **common)
            for kind, keep_rate in KINDS
            if not options.quick or keep_rate != 0.5
        ]
        for precision in precisions
        for side, batch in sizes
    ]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--output", type=Path, help="write OUTPUT.json, OUTPUT.md and OUTPUT.png as well")
    parser.add_argument("--model", choices=["tiny", "small", "base"], default="small")
    parser.add_argument(
        "--img-size",
        type=int,
        nargs="+",
        help=f"of square images, multiples of {PATCH} (default: {' '.join(map(str, SIDES))})",
    )
    parser.add_argument("--batch", type=int, nargs="+", help="at the smallest size (default: 1 4 16)")
    parser.add_argument("--precision", nargs="+", choices=["float32", "bfloat16"], help="default: both")
    parser.add_argument(
        "--seconds",
        type=float,
        help="for each group of rows, but at least 3 forwards (default: 4, --quick 2)",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="three sizes, batch 1, float32, keep rate 0.7",
    )
    options = parser.parse_args()
    for side in options.img_size or ():
        if side < PATCH or side % PATCH:
            parser.error(f"--img-size must be multiples of {PATCH}, got {side}")
    return options


def main() -> None:
    options = parse()
    seconds = options.seconds or (2.0 if options.quick else 4.0)
    rows: list[dict[str, Any]] = []
    start = time.perf_counter()

    def clock() -> timedelta:
        return timedelta(seconds=round(time.perf_counter() - start))

    everything = groups(options)
    for number, group in enumerate(everything, 1):
        first = group[0]
        what = f"{tokens(first.side)} tokens, batch {first.batch}, {first.precision}, {len(group)} models"
        print(f"[{number}/{len(everything)}, {clock()}] {what}", flush=True)
        rows += measure(group, seconds)
    print(f"in {clock()}\n", flush=True)
    found = fits(rows)
    text = (
        "ms: median of the forwards, which take turns. MiB: what the first forward of a fresh process needs "
        "at its peak beyond what is there before it. A dash: not measured.\n\n"
        f"{table(rows)}\nMemory and time against the tokens N of one image. Farthest from the line: of all "
        "sizes, the largest distance between measured memory and the straight line a + b · N, in percent of "
        "what was measured. N²: the share of c · N² in the parabola a + b · N + c · N². N^: the power that "
        f"fits the larger half of the sizes best.\n\n{fits_table(found)}"
    )
    print(text)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        facts = machine(options.device)
        contents = {"machine": facts, "rows": rows, "fits": found}
        options.output.with_suffix(".json").write_text(json.dumps(contents, indent=1) + "\n")
        heading = f"# Growth of DeiT-{options.model[0].upper()}'s time and memory\n\n"
        heading += "".join(f"- {key}: {fact}\n" for key, fact in facts.items())
        options.output.with_suffix(".md").write_text(f"{heading}\n{text}")
        plot(rows, options.output.with_suffix(".png"), options.device.upper())


if __name__ == "__main__":
    main()
