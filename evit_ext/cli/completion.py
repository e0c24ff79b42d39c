"""``evit --completion``: a script with which a shell completes commands, options, models and files.

The script is static, made by shtab from the parser: pressing the tab key does not start Python, which takes
seconds to import torch.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import Any

from evit_ext import models
from evit_ext.training.config import recipe_names

SHELLS = ("bash", "zsh", "fish")

_BOTH = "_evit_models_and_folders"

#: A function of each shell that completes what `evit export` takes: a model's name, or the folder of a run.
_PREAMBLES = {
    "bash": '{both}() {{ compgen -W "{names}" -- "$1"; compgen -d -- "$1"; }}',
    "zsh": "{both}() {{ _alternative 'models:model:({names})' 'folders:folder:_files -/' }}",
    "fish": "function {both}; printf '%s\\n' {names}; __fish_complete_directories; end",
}


class Completion(argparse.Action):
    """Print the script for the shell that is named, and end."""

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
    """Return the script that completes a parser's command in a shell of :data:`SHELLS`.

    Raises:
        ImportError: shtab is missing.
    """
    try:
        import shtab
    except ImportError as error:
        raise ImportError("--completion needs shtab: pip install 'evit_ext[completion]'") from error
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
    """Yield the arguments of a parser and of its commands."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _actions(command)
        else:
            yield action
