"""Write docs/kernels-on-a-gpu.md: each operator and kernel against what it cannot be faster than.

    python benchmarks/kernel_limits.py
    python benchmarks/kernel_limits.py --operators operators-GPU.json --counters counters-GPU.csv --page x.md

Of the times that benchmarks/operators.py has written on a GPU and, where they are, the counters of
benchmarks/kernel_counters.py; by default those of one GPU in benchmarks/results. Without results the page
says that nothing was measured. A plot lies beside the page, under its name.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nsight_csv import Kernel, by_operator, kernels, read_page
from operator_times.report import SHARES, SHARES_BATCH
from time_limit import write_whole

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "kernels-on-a-gpu.md"
MODEL, DTYPE = "DeiT-S", "bfloat16"

#: Percent of a unit's peak from which on it is what limits a kernel, and from which on it is near to it. At
#: these Nsight Compute's own hints change.
FULL, NEAR = 80.0, 60.0
#: Bank conflicts are named from this share of shared memory's wavefronts on.
CONFLICTS = 0.1

NOT_MEASURED = """\
**Not measured yet**: no GPU has run these kernels. On a machine with one,

```sh
make gpu-check                              # among others operators-GPU.json, at most ten minutes
make gpu-bench ARGS="--only counters"       # counters-GPU.csv; needs Nsight Compute
python benchmarks/kernel_limits.py          # this page, and its plot
```

[gpu-session.md](gpu-session.md) has the whole sequence.
"""


@dataclass(frozen=True)
class Unit:
    """A part of the GPU that a kernel may keep busy, and the counters that say how busy."""

    name: str
    pattern: str


_PEAK = r"\.avg\.pct_of_peak_sustained_(elapsed|active)"
UNITS = (
    Unit("device memory", r"(gpu__dram|dram__)_?throughput" + _PEAK),
    Unit("L2", r"lts__throughput" + _PEAK),
    Unit("L1 and shared memory", r"l1tex__throughput" + _PEAK),
    Unit("tensor cores", r"sm__(inst_executed_pipe_tensor\w*|pipe_tensor\w*cycles_active)" + _PEAK),
    Unit("multiprocessors", r"sm__throughput" + _PEAK),
)
STALL = "smsp__average_warps_issue_stalled_"
STALLS = {
    "long_scoreboard": "device memory or L2",
    "short_scoreboard": "shared memory",
    "mio_throttle": "the queue of shared memory and special functions",
    "lg_throttle": "the queue of loads and stores",
    "barrier": "the other warps of the block",
    "math_pipe_throttle": "an arithmetic pipe",
    "wait": "fixed latencies",
    "not_selected": "its turn",
    "selected": "nothing",
    "drain": "its last stores",
    "gmma": "products of a warp group",
    "imc_miss": "constants",
    "no_instruction": "instructions",
    "membar": "a memory barrier",
    "tex_throttle": "the queue of textures",
    "dispatch_stall": "the dispatcher",
    "branch_resolving": "a branch",
    "sleeping": "its sleep",
    "misc": "something else",
}


def busy(kernel: Kernel) -> dict[str, float]:
    """Return the percent of its peak at which each unit ran, of those that were counted."""
    found = {unit.name: kernel.largest(unit.pattern) for unit in UNITS}
    if found["device memory"] is None:  # of which some versions count reads and writes apart
        found["device memory"] = _read_and_written(kernel, ".sum.pct_of_peak_sustained_elapsed")
    return {name: value for name, value in found.items() if value is not None}


def top_stall(kernel: Kernel) -> tuple[str, float] | None:
    """Return what warps waited for most, and the share of their time; None where it was not counted."""
    names = {
        name.removeprefix(STALL).removesuffix("_per_issue_active.ratio"): value
        for name, value in kernel.counters.items()
        if name.startswith(STALL) and name.endswith("_per_issue_active.ratio") and "not_issued" not in name
    }
    total = sum(names.values())
    waits = {name: value for name, value in names.items() if name != "selected"}
    if not waits or total <= 0:
        return None
    name = max(waits, key=lambda name: waits[name])
    return name, waits[name] / total


def conflicts(kernel: Kernel) -> float | None:
    """Return the share of shared memory's wavefronts that bank conflicts added, or None."""
    stem, of = "l1tex__data_bank_conflicts_pipe_lsu_mem_shared", "l1tex__data_pipe_lsu_wavefronts_mem_shared"
    added, all_of = (_whole_or_parts(kernel, name) for name in (stem, of))
    if added is None or all_of is None:
        return None
    return added / all_of if all_of else 0.0


def _whole_or_parts(kernel: Kernel, name: str) -> float | None:
    """Return a counter of shared memory, or else the sum of those of its loads and stores."""
    whole = kernel.first(f"{name}.sum")
    parts = [kernel.first(f"{name}_op_{part}.sum") for part in ("ld", "st")]
    known = [part for part in parts if part is not None]
    return whole if whole is not None or not known else sum(known)


def moved_bytes(kernel: Kernel) -> float | None:
    """Return what was read from device memory and written to it, or None where not counted."""
    return _read_and_written(kernel, ".sum")


def _read_and_written(kernel: Kernel, what: str) -> float | None:
    found = [
        kernel.first(f"dram__bytes_{way}{what}", f"dram__bytes_op_{way}{what}") for way in ("read", "write")
    ]
    known = [part for part in found if part is not None]
    return sum(known) if len(known) == 2 else None


def occupancy(kernel: Kernel) -> float | None:
    """Return the percent of the warps that a multiprocessor can hold that it did hold, on average."""
    return kernel.first("sm__warps_active.avg.pct_of_peak_sustained_active")


def held_back_by(kernel: Kernel) -> str:
    """Return in words what limits a kernel, by the counters alone.

    The busiest unit, if it ran at 80 % of its peak or more; "mostly" it from 60 % on; below, nothing is full,
    and the kernel waits: the words then are what its warps wait for most, and whether it has enough blocks.
    """
    units = busy(kernel)
    if not units:
        return "not counted"
    name, percent = max(units.items(), key=lambda item: item[1])
    if name == "multiprocessors":
        # Their busiest pipe or the issue of instructions: where it is the tensor cores, say so.
        tensor = units.get("tensor cores", 0.0)
        name = "tensor cores" if tensor >= 0.95 * percent else "issuing instructions"
    added = conflicts(kernel)
    note = f"; {added:.0%} of shared memory's work are bank conflicts" if added and added >= CONFLICTS else ""
    if percent >= FULL:
        return f"{name}, at {percent:.0f}%{note}"
    if percent >= NEAR:
        return f"mostly {name}, at {percent:.0f}%{note}"
    words = f"waiting: nothing is busier than {percent:.0f}% ({name})"
    if stall := top_stall(kernel):
        words += f"; its warps wait most for {STALLS.get(stall[0], stall[0])} ({stall[1]:.0%} of their time)"
    waves = kernel.first("launch__waves_per_multiprocessor")
    if waves is not None and waves < 1:
        words += f"; its blocks are {waves:.0%} of what the GPU runs at once"
    return words + note


def page(operators: dict[str, Any] | None, counted: list[Kernel], image: str = "") -> str:
    """Return the page, of the contents of operators-GPU.json and of the kernels' counters."""
    text = (
        "# The kernels against their limits\n\nWhat each operator must move, how long it takes, and what "
        "holds its kernels back, on a GPU. Made by\n`benchmarks/kernel_limits.py`; "
        "[cuda-kernels.md](cuda-kernels.md) says how the kernels are laid out.\n\n"
    )
    rows = chosen(operators)
    if not operators or not rows:
        return text + NOT_MEASURED
    machine, bandwidth = operators["machine"], operators["copy_gigabytes_per_second"]
    names = ("gpu", "driver", "torch", "torch_cuda", "built_with_cuda", "commit")
    text += "".join(f"- {name}: {machine[name]}\n" for name in names if name in machine)
    text += (
        f"\n{MODEL}, batch {SHARES_BATCH}, {DTYPE}. A copy of 1 GiB moves {bandwidth:.0f} GB/s, read and "
        'written: that is what\n"of the copy" is of, and "at least" is how long a copy would take for as '
        "many bytes. Bytes: each input that is needed\nread once, each output written once. Time: replayed "
        "from a CUDA graph, the inputs not in the cache.\n\n"
    )
    text += operators_table(rows, bandwidth)
    text += f"\n![Share of the copy bandwidth that each operator reaches]({image})\n" if image else ""
    return text + "\n## What the kernels wait for\n\n" + counters_part(counted)


def chosen(operators: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Return the rows that the page is of."""
    wanted = (MODEL, SHARES_BATCH, DTYPE)
    rows = operators["rows"] if operators else []
    return [row for row in rows if (row["model"], row["batch"], row["dtype"]) == wanted]


def operators_table(rows: list[dict[str, Any]], bandwidth: float) -> str:
    lines = ["| operator | bytes | at least | takes | of the copy | wanted |", "|---|---|---|---|---|---|"]
    for row in rows:
        goal = SHARES.get((row["operator"], row["direction"]))
        cells = [f"{row['operator']} {row['direction']}", f"{row['bytes'] / 1e6:.1f} MB"]
        cells += [
            f"{row['bytes'] / bandwidth / 1e3:.1f} µs",
            f"{row['microseconds']['ours, replayed']:.1f} µs",
        ]
        cells += [f"{row['gigabytes_per_second']['ours'] / bandwidth:.0%}", f"≥ {goal:.0%}" if goal else "–"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def counters_part(counted: list[Kernel]) -> str:
    """Return what the counters say, or that there are none."""
    if not counted:
        return 'Not measured: `make gpu-bench ARGS="--only counters"` needs Nsight Compute.\n'
    text = (
        "Each kernel once under Nsight Compute, the caches emptied before it and the clocks left alone: "
        "times may be longer than above. Moved is what device memory saw: what a kernel wrote last may still "
        "be in L2 when it ends, and is not in it. Percent are of the unit's theoretical peak, which of "
        "device memory no copy reaches. The last column names the busiest unit, if it ran at "
        f"{FULL:.0f}% or more; mostly it, from {NEAR:.0f}% on; below that nothing is full, the kernel waits, "
        "and it says for what its warps wait most. A dash: not counted."
    )
    text = textwrap.fill(text, 120) + "\n\n"
    lines = [
        "| operator | kernel | µs | moved | device memory | L2 | L1, shared | tensor cores | SM | occupancy "
        "| bank conflicts | held back by |",
        "|" + "---|" * 12,
    ]
    for operator, launched in by_operator(counted).items():
        for kernel in launched:
            units, seconds = busy(kernel), kernel.first("gpu__time_duration.sum")
            moved = moved_bytes(kernel)
            added = conflicts(kernel)
            cells = [operator, f"`{kernel.short_name}`"]
            cells += [_cell(seconds and seconds * 1e6, "{:.1f}"), _cell(moved and moved / 1e6, "{:.1f} MB")]
            cells += [_cell(units.get(unit.name), "{:.0f}%") for unit in UNITS]
            cells += [_cell(occupancy(kernel), "{:.0f}%"), _cell(added, "{:.0%}"), held_back_by(kernel)]
            lines.append("| " + " | ".join(cells) + " |")
    return text + "\n".join(lines) + "\n"


def _cell(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)


def plot(rows: list[dict[str, Any]], bandwidth: float, title: str, path: Path) -> None:
    """Draw the share of the copy bandwidth that each operator reaches, and what was aimed at."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [f"{row['operator']}\n{row['direction']}" for row in rows]
    shares = [100 * row["gigabytes_per_second"]["ours"] / bandwidth for row in rows]
    figure, axis = plt.subplots(figsize=(8, 0.5 * len(rows) + 1.5))
    bars = axis.barh(names, shares, color="C0")
    axis.bar_label(bars, fmt="%.0f%%", padding=3)
    for place, row in enumerate(rows):
        if goal := SHARES.get((row["operator"], row["direction"])):
            axis.plot([100 * goal] * 2, [place - 0.4, place + 0.4], color="black", linewidth=2)
    axis.axvline(100, color="gray", linestyle="--")
    axis.invert_yaxis()
    axis.set(xlim=(0, 1.12 * max(100.0, *shares)), title=title)
    axis.set_xlabel("percent of the bandwidth of a large copy; black: aimed at")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def latest(folder: Path) -> tuple[Path | None, Path | None]:
    """Return the operators' times on a GPU and the counters of the same one, where a folder has them.

    Raises:
        ValueError: there are results of several GPUs.
    """
    found = [path for path in sorted(folder.glob("operators-*.json")) if path.stem != "operators-cpu"]
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise ValueError(
            f"expected results of one GPU in {folder}, there are {names}: choose with --operators"
        )
    if not found:
        return None, None
    counters = folder / f"{found[0].stem.replace('operators', 'counters', 1)}.csv"
    return found[0], counters if counters.exists() else None


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--operators", type=Path, help="JSON of benchmarks/operators.py --device cuda")
    parser.add_argument("--counters", type=Path, help="CSV of benchmarks/kernel_counters.py")
    parser.add_argument("--page", type=Path, default=PAGE, help="(default: docs/kernels-on-a-gpu.md)")
    arguments = parser.parse_args()
    try:
        operators_from, counters_from = arguments.operators, arguments.counters
        if operators_from is None:
            operators_from, beside = latest(RESULTS)
            counters_from = counters_from or beside
        operators = json.loads(operators_from.read_text()) if operators_from else None
        counted = kernels(read_page(counters_from.read_text())) if counters_from else []
        if operators is not None and "copy_gigabytes_per_second" not in operators:
            raise ValueError(f"{operators_from} was not measured on a GPU")
    except (OSError, ValueError) as error:
        parser.error(str(error))
    rows = chosen(operators)
    image = arguments.page.with_suffix(".png")
    drawn = bool(rows) and importlib.util.find_spec("matplotlib") is not None
    if rows and not drawn:
        print("no plot: matplotlib is not installed")
    if operators and drawn:
        title = f"{MODEL}, batch {SHARES_BATCH}, {DTYPE}, {operators['machine']['gpu']}"
        plot(rows, operators["copy_gigabytes_per_second"], title, image)
    write_whole(arguments.page, page(operators, counted, image.name if drawn else ""))
    print(f"{arguments.page}: {len(rows)} operators, {len(counted)} kernels counted")
    return 0


if __name__ == "__main__":
    sys.exit(main())
