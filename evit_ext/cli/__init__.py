"""The command ``evit``: see ``evit --help``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import evit_ext
from evit_ext.cli import benchmark, evaluate, info, train


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status, 2 for bad input."""
    parser = argparse.ArgumentParser(
        prog="evit", description="EViT: vision transformers that keep the patches that matter."
    )
    parser.add_argument("--version", action="version", version=f"evit_ext {evit_ext.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in (train, evaluate, benchmark, info):
        command.add_parser(commands)
    options = parser.parse_args(arguments)
    try:
        status = options.run(options)
    except KeyboardInterrupt:
        print("evit: interrupted", file=sys.stderr)
        return 130
    except (ValueError, TypeError, RuntimeError, AssertionError, OSError) as error:
        print(f"evit: error: {error}", file=sys.stderr)
        return 2
    return int(status or 0)
