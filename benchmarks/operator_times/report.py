"""The figures of a GPU as tables, and whether they are what was aimed at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

Row = dict[str, Any]

#: Of the bandwidth of a copy of x, at batch 256 in bfloat16: as many bytes as the operators move, within a
#: factor of two. A copy of a GiB would be the wrong measure: no kernel of some 10 µs reaches its bandwidth.
SHARES = {
    ("reorganize_tokens", "forward"): 0.85,
    ("class_attention", "forward"): 0.75,
    ("class_attention", "backward"): 0.70,
}
SHARES_BATCH = 256
STAGE_MICROSECONDS = 12.0  # at batch 1, in a CUDA graph
TIMES_EAGER = 3.0  # at every batch size, both called from Python
TIMES_COMPILED = 1.5  # at every batch size, both replayed from a CUDA graph
#: attention_with_scores next to PyTorch's attention and class_attention, at every batch size, replayed. Below
#: 1, these go on running in its place.
TIMES_ATTENTION = 1.0


@dataclass(frozen=True)
class Target:
    """Something aimed at; `met` is None where it was not measured."""

    name: str
    wanted: str
    found: str
    met: bool | None


def times(row: Row, other: str, how: str) -> float | None:
    """How many times faster than another candidate the operator is, or None where that was not measured."""
    micro = row["microseconds"]
    name = f"{other}, {how}"
    return micro[name] / micro[f"ours, {how}"] if name in micro else None


def share(row: Row) -> float:
    """Of the bandwidth of a copy of x, timed in turn with the operator."""
    rate = row["gigabytes_per_second"]
    return float(rate["ours"] / rate["copy"])


def targets(rows: list[Row]) -> list[Target]:
    """Every target, by the rows in bfloat16."""
    rows = [row for row in rows if row["dtype"] == "bfloat16"]

    def worst(
        name: str,
        wanted: str,
        goal: float,
        at_least: bool,
        among: list[Row],
        value: Callable[[Row], float | None],
        write: str,
    ) -> Target:
        found = [(v, row) for row in among if (v := value(row)) is not None]
        if not found:
            return Target(name, wanted, "not measured", None)
        number, row = (min if at_least else max)(found, key=lambda pair: pair[0])
        text = f"{write.format(number)} ({row['model']}, batch {row['batch']})"
        return Target(name, wanted, text, number >= goal if at_least else number <= goal)

    result = []
    for (operator, direction), goal in SHARES.items():
        among = [r for r in rows if (r["operator"], r["direction"]) == (operator, direction)]
        among = [r for r in among if r["batch"] == SHARES_BATCH]
        result.append(
            worst(
                f"{operator} {direction}, share of a copy's bandwidth, batch {SHARES_BATCH}",
                f"≥ {goal:.0%}",
                goal,
                True,
                among,
                share,
                "{:.0%}",
            )
        )
    stages = [r for r in rows if r["operator"] == "stage" and r["batch"] == 1]
    result.append(
        worst(
            "whole stage, batch 1, in a CUDA graph",
            f"≤ {STAGE_MICROSECONDS:.0f} µs",
            STAGE_MICROSECONDS,
            False,
            stages,
            lambda r: float(r["microseconds"]["ours, replayed"]),
            "{:.1f} µs",
        )
    )
    compared = [
        ("class_attention", "forward"),
        ("class_attention", "backward"),
        ("reorganize_tokens", "forward"),
        ("reorganize_tokens", "backward"),
        ("add_reorganize_norm", "forward"),
    ]
    for other, how, goal in (("eager", "called", TIMES_EAGER), ("compiled", "replayed", TIMES_COMPILED)):
        for operator, direction in compared:
            among = [r for r in rows if (r["operator"], r["direction"]) == (operator, direction)]
            result.append(
                worst(
                    f"{operator} {direction}, times faster than {other}, both {how}",
                    f"≥ {goal:g}",
                    goal,
                    True,
                    among,
                    lambda r, other=other, how=how: times(r, other, how),  # type: ignore[misc]
                    "{:.1f}",
                )
            )
    among = [r for r in rows if (r["operator"], r["direction"]) == ("attention_with_scores", "forward")]
    for other in ("eager", "compiled"):
        result.append(
            worst(
                f"attention_with_scores, times faster than attention and scores apart, {other}, replayed",
                f"≥ {TIMES_ATTENTION:g}",
                TIMES_ATTENTION,
                True,
                among,
                lambda r, other=other: times(r, other, "replayed"),  # type: ignore[misc]
                "{:.2f}",
            )
        )
    return result


def targets_table(found: list[Target]) -> str:
    lines = ["| target | wanted | found, at worst | met |", "|---|---|---|---|"]
    for target in found:
        met = {True: "yes", False: "no", None: "–"}[target.met]
        lines.append(f"| {target.name} | {target.wanted} | {target.found} | {met} |")
    return "\n".join(lines) + "\n"


def verdict(found: list[Target]) -> str:
    """One line: how many are met, and which are not."""
    line = f"targets met: {sum(target.met is True for target in found)} of {len(found)}"
    for label, value in (("missed", False), ("not measured", None)):
        names = [target.name for target in found if target.met is value]
        line += f"; {label}: {'; '.join(names)}" if names else ""
    return line


def table(rows: list[Row]) -> str:
    """The rows as a Markdown table. Replayed: from a CUDA graph; called: from Python."""
    lines = [
        "| model | batch | dtype | operator | µs | GB/s | of copy | copy of x: µs | compiled: µs | times "
        "| called: µs | eager, called: µs | times | compiled, called: µs | times |",
        "|" + "---|" * 15,
    ]
    keys = ("model", "dtype", "operator", "direction", "batch")
    for row in sorted(rows, key=lambda row: [row[key] for key in keys]):
        micro = row["microseconds"]
        cells = [row["model"], row["batch"], row["dtype"], f"{row['operator']} {row['direction']}"]
        cells += [f"{micro['ours, replayed']:.1f}", f"{row['gigabytes_per_second']['ours']:.0f}"]
        cells += [f"{share(row):.0%}", f"{micro['copy']:.1f}"]
        cells += _compared(row, "compiled", "replayed")
        cells += [f"{micro['ours, called']:.1f}"]
        cells += _compared(row, "eager", "called") + _compared(row, "compiled", "called")
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _compared(row: Row, other: str, how: str) -> list[str]:
    ratio = times(row, other, how)
    return ["–", "–"] if ratio is None else [f"{row['microseconds'][f'{other}, {how}']:.1f}", f"{ratio:.1f}"]


def summary(
    rows: list[Row], bandwidth: float, left_out: list[str], failures: list[str]
) -> tuple[str, dict[str, Any]]:
    """All of it as Markdown, the verdict last, and as the contents of a JSON file."""
    found = targets(rows)
    text = f"A copy of 1 GiB: {bandwidth:.0f} GB/s, read and written.\n\n{table(rows)}\n"
    text += targets_table(found) + "".join(f"\nLeft out: {what}.\n" for what in left_out)
    text += "".join(f"\nFailed: {what}.\n" for what in failures)
    figures = {
        "copy_gigabytes_per_second": bandwidth,
        "targets": [asdict(target) for target in found],
        "left_out": left_out,
        "failures": failures,
        "rows": rows,
    }
    return f"{text}\n{verdict(found)}\n", figures
