"""``evit --completion``: a script that lets a shell complete commands, options, models and files.

The script is static, generated from the parser by shtab. So the tab key does not start Python, which would
take seconds to import torch.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import Any

from evit_ext.training.config import recipe_names

SHELLS = ("bash", "zsh", "fish")

_BOTH = "_evit_models_and_folders"

#: For each shell, a function that completes the argument of `evit export`: a model's name or a run's folder.
_PREAMBLES = {
    "bash": '{both}() {{ compgen -W "{names}" -- "$1"; compgen -d -- "$1"; }}',
    "zsh": "{both}() {{ _alternative 'models:model:({names})' 'folders:folder:_files -/' }}",
    "fish": "function {both}; printf '%s\\n' {names}; __fish_complete_directories; end",
}


class Completion(argparse.Action):
    """Print the script for the named shell and exit."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        try:
            print(script(parser, str(values)), flush=True)
        except ImportError as error:
            parser.error(str(error))
        parser.exit()


def script(parser: argparse.ArgumentParser, shell: str) -> str:
    """Return the completion script of a parser's command for one of :data:`SHELLS`.

    Raises:
        ImportError: shtab is not installed.
    """
    try:
        import shtab
    except ImportError as error:
        raise ImportError("--completion needs shtab: pip install 'evit_ext[completion]'") from error
    from evit_ext import models  # here, because it takes a while

    both: Any = {name: f"({_BOTH})" if name == "fish" else _BOTH for name in SHELLS}
    for action in _actions(parser):
        kinds = set(str(action.metavar or "").split("|"))
        if action.dest == "recipe":
            action.choices = recipe_names()
        elif kinds >= {"MODEL", "RUN"}:
            action.complete = both  # type: ignore[attr-defined]
        elif "MODEL" in kinds or action.dest == "model":
            action.choices = models.__all__
        elif kinds & {"FILE", "PHOTO", "STEM"}:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
        elif kinds & {"FOLDER", "RUN"}:
            action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
    names = " ".join(models.__all__)
    preamble: Any = {name: text.format(both=_BOTH, names=names) for name, text in _PREAMBLES.items()}
    return str(shtab.complete(parser, shell, preamble=preamble))


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Yield the arguments of a parser and of its subcommands."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _actions(command)
        else:
            yield action
