"""What end_to_end.py aims at on a GPU, and whether it is met.

Of an H200, in bfloat16, DeiT-S at keep rate 0.7. Its multiply-accumulates are 1.5 times fewer than the dense
model's, so that the first target leaves nothing for the reorganisation itself but what attention saves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from operator_times.report import Target

from evit_ext.benchmark import Row

PRECISION = "bfloat16"
EVIT, DENSE, PLAIN = "EViT 0.7", "dense", "plain EViT 0.7"


@dataclass(frozen=True)
class Aim:
    """How many times faster than `other` the EViT is to be, in the rows of a task, mode and batch."""

    task: str
    mode: str
    batch: int
    other: str
    times: float

    def __str__(self) -> str:
        mode = {"eager": "eager", "compile": "both compiled", "cudagraph": "both in CUDA graphs"}[self.mode]
        return f"{EVIT} over {self.other}, {self.task}, {PRECISION}, batch {self.batch}, {mode}"


AIMS = (
    Aim("inference", "compile", 256, DENSE, 1.5),
    Aim("inference", "cudagraph", 1, DENSE, 1.3),
    Aim("inference", "eager", 256, PLAIN, 1.8),
    Aim("training", "eager", 256, DENSE, 1.4),
)


def targets(rows: Sequence[Row]) -> list[Target]:
    """Return every target, with what was found of it."""
    found = []
    for aim in AIMS:
        of = {row.model: row for row in rows if _belongs(row, aim)}
        wanted = f"≥ {aim.times:g} times"
        if EVIT in of and aim.other in of:
            times = of[aim.other].milliseconds / of[EVIT].milliseconds
            found.append(Target(str(aim), wanted, f"{times:.2f} times", times >= aim.times))
        else:
            found.append(Target(str(aim), wanted, "not measured", None))
    return found


def rank(task: str, precision: str, modes: Sequence[str], batch: int) -> int:
    """Return which target a group is measured for, or how many there are where for none."""
    for number, aim in enumerate(AIMS):
        if (aim.task, PRECISION, aim.batch) == (task, precision, batch) and aim.mode in modes:
            return number
    return len(AIMS)


def _belongs(row: Row, aim: Aim) -> bool:
    return (row.task, row.mode, row.precision, row.batch) == (aim.task, aim.mode, PRECISION, aim.batch)
