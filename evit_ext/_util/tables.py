"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence


def aligned(lines: Sequence[Sequence[str]], rule: bool = False) -> str:
    """Return the cells as a table, the first column aligned left and the others right.

    Args:
        lines: at least one, all of the same length; the first has the headings.
        rule: draw a line below the headings.
    """
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    rows = [
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    if rule:
        rows.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(rows)
