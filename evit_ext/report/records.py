"""What a run's folder says about it: its figures over the steps, its results, what it could not read."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evit_ext.training.config import TrainConfig, load_config

#: Points of a curve, (epoch, value); epochs count from 0, a step within one is a part of it.
Points = list[tuple[float, float]]


@dataclass
class RunRecords:
    """The figures of a run.

    Attributes:
        name: of the folder.
        config: as the run has written it.
        rows: of metrics.csv, numbers as floats; in order.
        summary: of a run that has ended; None of one that has not.
        unreadable: path and reason of each image that could not be read.
    """

    name: str
    config: TrainConfig
    rows: list[dict[str, Any]]
    summary: dict[str, Any] | None = None
    unreadable: list[tuple[str, str]] = field(default_factory=list)

    def curve(self, kind: str, figure: str) -> Points:
        """Return a figure of one kind of records; without records that lack it or are not finite."""
        ends = {row["epoch"]: row["step"] for row in self.rows if row["kind"] == "epoch"}
        whole = min((step / epoch for epoch, step in ends.items()), default=0.0)
        points = []
        for row in self.rows:
            value = row.get(figure)
            if row["kind"] == kind and value is not None and math.isfinite(value):
                # Before the end of the first epoch, nothing says how many steps it has.
                points.append((row["step"] / whole if whole else row["step"], value))
        return points

    @property
    def horizontal(self) -> str:
        """What curves are drawn over: epochs, or steps before the first epoch has ended."""
        return "epoch" if any(row["kind"] == "epoch" for row in self.rows) else "step"


def read_run(folder: str) -> RunRecords:
    """Read the records of a run.

    Raises:
        FileNotFoundError: it is not the folder of a run, or has no metrics.csv.
        ValueError: a file of it cannot be understood.
    """
    root = Path(folder)
    for name in ("config.yaml", "metrics.csv"):
        if not (root / name).is_file():
            raise FileNotFoundError(f"there is no {root / name}: {folder} is not the folder of a run")
    records = RunRecords(root.resolve().name, load_config(root / "config.yaml"), _rows(root / "metrics.csv"))
    if (root / "summary.json").is_file():
        try:
            records.summary = json.loads((root / "summary.json").read_text("utf-8"))
        except ValueError as error:
            raise ValueError(f"{root / 'summary.json'} is not JSON: {error}") from error
    if (root / "unreadable.csv").is_file():
        with (root / "unreadable.csv").open(newline="", encoding="utf-8", errors="backslashreplace") as file:
            records.unreadable = [(row["path"], row["reason"]) for row in csv.DictReader(file)]
    return records


def _rows(path: Path) -> list[dict[str, Any]]:
    with path.open(newline="", encoding="utf-8") as file:
        found = list(csv.DictReader(file))
    rows = []
    for number, row in enumerate(found, start=2):
        try:
            cells = {name: float(cell) for name, cell in row.items() if name != "kind" and cell}
            rows.append({**cells, "kind": row["kind"], "step": cells["step"], "epoch": cells["epoch"]})
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}, line {number}: expected numbers, got {row}") from error
    return rows
