"""``python -m evit_ext.demo``: see ``--help``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from evit_ext.data import DIFFICULTIES
from evit_ext.demo import FULL, QUICK, Demo


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit status, 2 for bad input and missing packages."""
    parser = argparse.ArgumentParser(
        prog="python -m evit_ext.demo",
        description="Train a small DeiT on cluttered digits, fine-tune EViTs at keep rates 0.7 and 0.5 from "
        "it, and compare accuracy, speed and which patches are kept. Nothing is downloaded; about ten "
        "minutes on two cores.",
        epilog="Writes metrics.json, tokens.png (what is left after each stage) and the trained weights.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="folder for the results")
    parser.add_argument(
        "--difficulty",
        choices=list(DIFFICULTIES),
        default="easy",
        help="easy: the digit among six faint pieces of others; hard: among ten as bright as itself, which "
        "the recipe's 8 epochs do not suffice for",
    )
    parser.add_argument(
        "--epochs",
        type=int,
        default=argparse.SUPPRESS,
        help=f"of the DeiT (default: {FULL.dense.epochs}, with --quick {QUICK.dense.epochs})",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the training images")
    parser.add_argument(
        "--precision", choices=("auto", "float32", "bfloat16"), default="auto", help="auto asks the processor"
    )
    parser.add_argument(
        "--quick", action="store_true", help="every step in seconds; the networks learn nothing"
    )
    options = parser.parse_args(arguments)
    settings = replace(QUICK if options.quick else FULL, difficulty=options.difficulty)
    try:
        if "epochs" in options:
            settings = replace(settings, dense=replace(settings.dense, epochs=options.epochs))
        Demo(settings, options.output, options.seed, options.precision).run()
    except (ValueError, ModuleNotFoundError, OSError, FloatingPointError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\n{parser.prog}: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
