"""The command-line options that end_to_end.py and growth.py share, which make bench gives to both."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch


def parser(description: str | None, gpu_minutes: float) -> argparse.ArgumentParser:
    """Return a parser that knows them; `gpu_minutes` is the time limit on a GPU where none is given."""
    found = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    found.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    found.add_argument("--output", type=Path, help="write OUTPUT.json, OUTPUT.md and OUTPUT.png as well")
    found.add_argument("--model", choices=["tiny", "small", "base"], default="small")
    found.add_argument(
        "--minutes",
        type=float,
        help=f"for everything; what does not fit is left out (default: none; on a GPU {gpu_minutes:g})",
    )
    return found


def parse(options: argparse.ArgumentParser, gpu_minutes: float) -> argparse.Namespace:
    """Return the options of the command line, checked: what is wrong ends the program with one line."""
    given = options.parse_args()
    for name in ("minutes", "seconds"):
        if getattr(given, name) is not None and not getattr(given, name) > 0:
            options.error(f"--{name} must be positive, got {getattr(given, name):g}")
    if given.batch and min(given.batch) < 1:
        options.error(f"--batch must be 1 or more, got {min(given.batch)}")
    if given.device == "cuda" and not torch.cuda.is_available():
        options.error("--device cuda needs a GPU: torch.cuda.is_available() is False")
    if given.minutes is None and given.device == "cuda":
        given.minutes = gpu_minutes
    return given
