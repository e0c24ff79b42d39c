"""The command ``evit``: see ``evit --help``."""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

from evit_ext._util.spelling import nearest
from evit_ext._util.version import VERSION
from evit_ext.cli import completion, train
from evit_ext.cli.grammar import benchmark, evaluate, export, info, report, visualize
from evit_ext.cli.output import words_of

# Here, because importing evit_ext.cli.info and the like gives these names to other modules.
_COMMANDS = (train, evaluate, report, visualize, benchmark, export, info)

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
        sentences = self._unrecognized(unknown)
        # `evit train` tells them together with all else that is wrong.
        namespace.unrecognized = [f"{sentence}; see {self.prog} --help" for sentence in sentences]
        if sentences and self.get_default("run") != "evit_ext.cli.train":
            self.error("; ".join(sentences))
        return namespace, []

    def _unrecognized(self, unknown: Sequence[str]) -> list[str]:
        """Return a sentence for each option that there is not, with what follows it."""
        known = [option for action in self._actions for option in action.option_strings]
        groups: list[list[str]] = []
        for word in unknown:
            if groups and not word.startswith("--"):
                groups[-1].append(word)
            else:
                groups.append([word])
        said = []
        for words in groups:
            near = nearest(words[0].partition("=")[0], known) if words[0].startswith("-") else None
            hint = f" (the nearest is {near})" if near else ""
            said.append(f"unrecognized arguments: {' '.join(words)}{hint}")
        return said


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
    for command in _COMMANDS:
        command.add_parser(commands)
    for subparser in commands.choices.values():
        # No default: it would override a --verbose given before the subcommand.
        subparser.add_argument("--verbose", action="store_true", default=argparse.SUPPRESS, help=help_text)
    return parser


def _wait_asleep(command: str) -> None:
    """Have OpenMP's threads sleep while they wait for each other, unless the environment says how to wait.

    By default they spin, which takes the cores from loaders of data and whatever else is running: with two
    busy processes on two cores, a forward took 11 times as long. ``evit benchmark`` measures what an ordinary
    program would take, and so leaves it as it is. OpenMP reads the variable once, when torch is loaded: a
    program that has done so, and calls :func:`main`, keeps its own.
    """
    if command != "evit_ext.cli.benchmark" and "torch" not in sys.modules:
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


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
        _wait_asleep(options.run)
        # A command that is right may take seconds to import what it needs.
        status = importlib.import_module(options.run).run(options)
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
        print(f"evit: error: {words_of(error)}", file=sys.stderr)
        return 2
    return int(status or 0)
