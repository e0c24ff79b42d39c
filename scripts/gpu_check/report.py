"""The summary: a table, a sentence, and the files they are written to."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .outcomes import Result

#: What is left out without a Python package that is not needed for the rest.
TESTED_WITH = {"expecttest": "torch.library.opcheck on the operators"}


def untested(facts: dict[str, Any]) -> list[str]:
    """What the tests leave out for want of a package; the tests pass without it."""
    missing = [name for name in TESTED_WITH if facts.get(name) == "not installed"]
    return [f"{TESTED_WITH[name]} ({name} is not installed)" for name in missing]


def table(results: list[Result]) -> str:
    """The results as a Markdown table."""
    lines = ["| step | outcome | seconds | detail |", "|---|---|---|---|"]
    for result in results:
        detail = result.detail.replace("|", "\\|").replace("\n", " ")
        lines.append(f"| {result.name} | {result.outcome} | {result.seconds:.0f} | {detail} |")
    return "\n".join(lines) + "\n"


def verdict(results: list[Result], count: int, not_tested: Sequence[str] = ()) -> str:
    """One sentence; `count` is the number of steps there are, `not_tested` what those that pass left out."""
    bad = [result.name for result in results if not result.fine]
    left_out = [result.name for result in results if result.excused]
    if len(results) < count:
        return f"not finished: {len(results)} of {count} steps have ended"
    sentence = f"{len(results) - len(bad) - len(left_out)} of {count} steps passed"
    sentence += f"; not run for want of a tool: {', '.join(left_out)}" if left_out else ""
    sentence += f"; not tested: {', '.join(not_tested)}" if not_tested else ""
    return sentence + (f"; not passed: {', '.join(bad)}" if bad else "")


def write_summary(
    stem: Path,
    facts: dict[str, Any],
    results: list[Result],
    count: int,
    title: str,
    not_tested: Sequence[str] = (),
) -> None:
    """STEM.json and STEM.md."""
    sentence = verdict(results, count, not_tested)
    everything = {
        "machine": facts,
        "verdict": sentence,
        "not_tested": list(not_tested),
        "steps": [asdict(result) for result in results],
    }
    _write_whole(stem.with_suffix(".json"), json.dumps(everything, indent=1) + "\n")
    heading = "".join(f"- {name}: {fact}\n" for name, fact in facts.items())
    _write_whole(stem.with_suffix(".md"), f"# {title}\n\n{heading}\n{table(results)}\n{sentence}\n")


def _write_whole(path: Path, text: str) -> None:
    """Whoever is killed meanwhile leaves the old contents or the new."""
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    part.replace(path)
