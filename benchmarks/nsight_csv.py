"""Counters as Nsight Compute writes them: `ncu --csv --page raw`, read and made fit to be kept.

The page has a line with the names of its columns, one with their units, then one for each kernel that ran.
What `ncu` says besides begins with "==". Names are those of the tool; which there are depends on its version
and on the GPU, so that nothing here needs any of them to be there.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

#: What the page says of the machine and the process, which is not to be kept.
_PRIVATE = ("Process ID", "Process Name", "Host Name", "Context", "Stream")
_FACTORS = {"K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_BASES = {"byte": 1.0, "ns": 1e-9, "nsecond": 1e-9, "us": 1e-6, "usecond": 1e-6, "ms": 1e-3, "msecond": 1e-3}
_BASES |= {"s": 1.0, "second": 1.0}


@dataclass
class Kernel:
    """A kernel that ran: whose it was, its name, its counters in bytes, seconds, percent or as counted."""

    operator: str
    name: str
    counters: dict[str, float] = field(default_factory=dict)

    def first(self, *names: str) -> float | None:
        """Return the first of these counters that is there."""
        return next((self.counters[name] for name in names if name in self.counters), None)

    def largest(self, pattern: str) -> float | None:
        """Return the largest of the counters whose whole name matches, or None where there is none."""
        found = [value for name, value in self.counters.items() if re.fullmatch(pattern, name)]
        return max(found, default=None)

    @property
    def short_name(self) -> str:
        """The name without namespaces, template arguments and parameters."""
        name = re.sub(r"\(anonymous namespace\)|<unnamed>", "", self.name)
        name = re.split(r"[<(]", name, maxsplit=1)[0]
        return re.split(r"::|\s", name.strip())[-1] or self.name


@dataclass(frozen=True)
class Page:
    """The lines of a raw page: names of columns, their units, and what was measured."""

    columns: list[str]
    units: list[str]
    lines: list[list[str]]


def read_page(text: str) -> Page:
    """Read a raw page.

    Raises:
        ValueError: there is none in the text, or it is not as expected.
    """
    rows = [row for row in csv.reader(line for line in text.splitlines() if line.startswith('"')) if row]
    start = next((number for number, row in enumerate(rows) if "Kernel Name" in row), None)
    if start is None:
        said = [line for line in text.splitlines() if line.startswith("==")]
        raise ValueError(f"no page of ncu --csv --page raw; it says: {said[-1] if said else 'nothing'}")
    columns, *lines = rows[start:]
    lines = [line for line in lines if line != columns]  # of a second process, as it stands again
    if "Metric Name" in columns:
        raise ValueError("this is another page of ncu: expected --page raw, a column for each counter")
    if any(len(line) != len(columns) for line in lines):
        raise ValueError(f"expected {len(columns)} fields in each line, as in the line of names")
    # The units' line is the one without a kernel.
    kernel = columns.index("Kernel Name")
    units = next((line for line in lines if not line[kernel]), [""] * len(columns))
    return Page(columns, units, [line for line in lines if line[kernel]])


def with_operators(page: Page, operators: Sequence[str], marker: str) -> Page:
    """Name the operator of each line, and leave out what is private and the markers.

    Before each operator ran a kernel whose name contains `marker`, and nothing else did.

    Raises:
        ValueError: there are more or fewer markers than operators, or a kernel before the first one.
    """
    kernel = page.columns.index("Kernel Name")
    found, number = [], -1
    for line in page.lines:
        if marker in line[kernel]:
            number += 1
        elif number < 0:
            raise ValueError(f"a kernel ran before the first operator: {line[kernel]}")
        elif number < len(operators):
            found.append((operators[number], line))
    if number + 1 != len(operators):
        raise ValueError(f"{number + 1} operators were measured, expected {len(operators)}")
    return _public(page, found)


def without_operators(page: Page) -> Page:
    """Leave out what is private, where it is not known whose the kernels are."""
    return _public(page, [("unknown", line) for line in page.lines])


def _public(page: Page, lines: Iterable[tuple[str, list[str]]]) -> Page:
    kept = [number for number, name in enumerate(page.columns) if name not in _PRIVATE]
    return Page(
        ["Operator", *(page.columns[place] for place in kept)],
        ["", *(page.units[place] for place in kept)],
        [[operator, *(line[place] for place in kept)] for operator, line in lines],
    )


def write_page(page: Page) -> str:
    """Return the page as CSV, everything quoted as ncu does."""
    out = io.StringIO()
    csv.writer(out, quoting=csv.QUOTE_ALL, lineterminator="\n").writerows(
        [page.columns, page.units, *page.lines]
    )
    return out.getvalue()


def kernels(page: Page) -> list[Kernel]:
    """Return the kernels of a page that names the operators; what is no number is left out."""
    found = []
    for line in page.lines:
        named = dict(zip(page.columns, line, strict=True))
        kernel = Kernel(named.get("Operator", ""), named["Kernel Name"])
        for name, unit, text in zip(page.columns, page.units, line, strict=True):
            # Counters have names of lower case with "__"; the others are settings of the launch.
            if "__" in name and (value := _number(text)) is not None:
                kernel.counters[name] = value * _factor(unit)
        found.append(kernel)
    return found


def _number(text: str) -> float | None:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None


def _factor(unit: str) -> float:
    """Return what makes bytes and seconds of a unit; 1 for those that are neither."""
    unit, per, _ = unit.partition("/")
    if unit in _BASES:
        return _BASES[unit]
    if per or unit[:1] not in _FACTORS:
        return 1.0
    return _FACTORS[unit[0]] if unit[1:] in ("byte", "B") else 1.0


def by_operator(found: Iterable[Kernel]) -> dict[str, list[Kernel]]:
    """Return the kernels of each operator, in the order in which they ran."""
    groups: dict[str, list[Kernel]] = {}
    for kernel in found:
        groups.setdefault(kernel.operator, []).append(kernel)
    return groups
