"""The demo's results as a table for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from evit_ext._util.tables import aligned

Row = Mapping[str, Any]


def format_table(rows: Sequence[Row]) -> str:
    """The rows of metrics.json, aligned; the first one is what the speed-up refers to.

    Shares are given as "network / random" for each stage.

    Raises:
        ValueError: there is no row.
    """
    if not rows:
        raise ValueError("there is no row to show")
    stages = max(len(row["object_patches_kept"]) for row in rows)
    header = ["model", "keep rate", "top-1 %", "GMACs", "images/s", "speed-up"]
    header += [f"kept at stage {stage + 1}" for stage in range(stages)]
    cells = [header]
    for row in rows:
        line = [
            str(row["model"]),
            f"{row['keep_rate']:.2f}",
            f"{row['top1']:.1f}",
            f"{row['gmacs']:.4f}",
            f"{row['images_per_second']:.0f}",
            f"{row['speedup']:.2f}x",
        ]
        shares = zip(row["object_patches_kept"], row["object_patches_kept_at_random"], strict=True)
        line += [f"{100 * share:.0f}% / {100 * random:.0f}%" for share, random in shares]
        cells.append(line + ["-"] * (len(header) - len(line)))
    return aligned(cells, rule=True)
