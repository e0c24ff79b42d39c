"""What became of each wheel, as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

PASSED = "passed"


@dataclass(frozen=True)
class Row:
    """A Python and a variant, and what became of their wheel."""

    python: str
    variant: str
    verdict: str
    file: str = ""
    size: int = 0  # bytes
    platform: str = ""
    torch: str = ""  # that it was built and tried with

    @property
    def passed(self) -> bool:
        return self.verdict.startswith(PASSED)


def table(rows: Sequence[Row]) -> str:
    """The rows in columns."""
    lines = [("python", "variant", "file", "MB", "tag", "torch", "verdict")]
    for row in rows:
        size = f"{row.size / 1e6:.2f}" if row.size else "–"
        rest = (row.platform or "–", row.torch or "–", row.verdict)
        lines.append((row.python, row.variant, row.file or "–", size, *rest))
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def verdict(rows: Sequence[Row]) -> str:
    """One sentence."""
    bad = [f"{row.python} {row.variant}" for row in rows if not row.passed]
    sentence = f"{len(rows) - len(bad)} of {len(rows)} wheels passed"
    return sentence + (f"; NOT: {', '.join(bad)}" if bad else "")
