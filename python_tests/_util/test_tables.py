"""Tables for the terminal."""

from __future__ import annotations

from evit_ext._util.tables import aligned


def test_aligned() -> None:
    lines = [["model", "top-1"], ["a", "9.5"]]
    assert aligned(lines) == "model  top-1\na        9.5"
    assert aligned(lines, rule=True) == "model  top-1\n-----  -----\na        9.5"
