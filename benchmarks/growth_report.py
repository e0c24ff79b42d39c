"""What growth.py measured: straight lines and parabolas fitted to it, tables, and the plot."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

PATCH = 16


def tokens(side: int) -> int:
    """Return patches of a square image, and the class token."""
    return (side // PATCH) ** 2 + 1


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
