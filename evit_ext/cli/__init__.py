"""The command ``evit``: see ``evit --help``."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

from evit_ext._util.spelling import nearest
from evit_ext._util.version import VERSION
from evit_ext.cli import benchmark, completion, evaluate, export, info, report, train, visualize

_EXAMPLES = """examples:
  evit info deit_base
  evit train --data photos                # a folder for each class
  evit train --recipe cluttered-digits
  evit eval runs/cluttered-digits --keep-rate 1 0.7 0.5
  evit report runs/photos
  evit visualize photo.jpg --model deit_small --checkpoint evit.pth -o photo.png
  evit benchmark deit_small --batch-size 1 16
  evit export deit_small --checkpoint evit.pth --format onnx
`evit COMMAND --help` has more of each.
"""


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, like all errors of the command."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"evit: error: {message}; see {self.prog} --help\n")


class _CommandParser(_Parser):
    """A subcommand's parser, which rejects unknown arguments itself, so that the error points to its help."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:
            options = [option for action in self._actions for option in action.option_strings]
            near = nearest(unknown[0].partition("=")[0], options)
            hint = f" (the nearest is {near})" if near else ""
            self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        return namespace, unknown


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command and its subcommands."""
    parser = _Parser(
        prog="evit",
        description="EViT: vision transformers that keep the patches that matter.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"evit_ext {VERSION}")
    parser.add_argument(
        "--completion",
        action=completion.Completion,
        choices=completion.SHELLS,
        help="print a script with which the shell completes commands, options and models",
    )
    help_text = "show where in the program an error comes from"
    parser.add_argument("--verbose", action="store_true", help=help_text)
    commands = parser.add_subparsers(
        title="commands", metavar="COMMAND", required=True, parser_class=_CommandParser
    )
    for command in (train, evaluate, report, visualize, benchmark, export, info):
        command.add_parser(commands)
    for subparser in commands.choices.values():
        # No default: it would override a --verbose given before the subcommand.
        subparser.add_argument("--verbose", action="store_true", default=argparse.SUPPRESS, help=help_text)
    return parser


def _words(error: Exception) -> str:
    """Return an error's message; for operating system errors, the file first and without the number."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return the exit status, 2 for bad input."""
    options = argparse.Namespace(verbose=False)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the caller, such as a cron job with >&-
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  # until Python ends
        elif hasattr(stream := getattr(sys, name), "reconfigure"):
            # A terminal or file that cannot show a letter shows its code, instead of ending the command.
            stream.reconfigure(errors="backslashreplace")
    try:
        options = parser().parse_args(arguments)
        status = options.run(options)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader, such as head, has closed the pipe; buffered output would raise again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        print("evit: interrupted", file=sys.stderr)
        return 130
    except (ValueError, TypeError, RuntimeError, AssertionError, OSError, ImportError) as error:
        if options.verbose:
            traceback.print_exc()
        print(f"evit: error: {_words(error)}", file=sys.stderr)
        return 2
    return int(status or 0)
