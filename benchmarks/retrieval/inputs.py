"""What the benchmarks on real weights have in common: their options, the model and pictures, writing."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from . import downloads, pictures, weights
from .pictures import Pictures
from .reductions import SIDE, build

#: Exit status where something was left out.
SKIPPED = 77


class Inputs(NamedTuple):
    """The full model, the file of its weights, the sets of pictures, and why others are missing."""

    full: nn.Module
    file: Path
    sets: dict[str, Pictures]
    missing: list[str]


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with --downloads, --splits and --output."""
    found = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    default = Path(__file__).resolve().parents[2] / "build" / "real-weights"
    found.add_argument("--downloads", type=Path, default=default, help="folder of downloads, which are kept")
    found.add_argument("--splits", type=_splits, default=5, help="into index and queries (default: 5)")
    found.add_argument("--output", type=Path, metavar="STEM", help="write STEM.json and STEM.md, too")
    return found


def _splits(value: str) -> int:
    if not value.isdecimal() or int(value) < 2:
        raise argparse.ArgumentTypeError(f"must be 2 or more, as intervals need, got {value}")
    return int(value)


def load(folder: Path) -> Inputs | None:
    """Download into `folder` what is not there yet; say what is missing, and return None if that is all."""
    try:
        file = downloads.onnx_file(folder)
    except downloads.Unavailable as reason:
        print(f"skipped, as there are no weights: {reason}", file=sys.stderr)
        return None
    full = build()
    full.load_state_dict(weights.state_dict(file, SIDE))
    sets, missing = pictures.find(folder, SIDE)
    for reason in missing:
        print(f"left out: {reason}", file=sys.stderr)
    return Inputs(full, file, sets, missing) if sets else None


def write(stem: Path | None, results: dict[str, Any], text: str) -> None:
    """Write STEM.json and STEM.md, unless `stem` is None."""
    if stem is not None:
        stem.parent.mkdir(parents=True, exist_ok=True)
        stem.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
        stem.with_suffix(".md").write_text(text)
