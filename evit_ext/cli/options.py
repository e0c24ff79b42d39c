"""Options shared by several commands: the fields of a configuration, weights, keep rates and the device."""

from __future__ import annotations

import argparse
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from evit_ext._util.choices import ENGINES
from evit_ext._util.messages import shown
from evit_ext._util.spelling import nearest
from evit_ext.training.config import TrainConfig

if TYPE_CHECKING:
    import torch


def add_weights(parser: Any, metavar: str = "FILE", more: str = "") -> None:
    """Add ``--checkpoint`` and ``--ema``, which choose a model's weights.

    Args:
        parser: an ArgumentParser or one of its groups.
        metavar: of ``--checkpoint``.
        more: text added to the help of ``--checkpoint``.
    """
    parser.add_argument(
        "--checkpoint", metavar=metavar, help=f"weights: whatever evit_ext.load_checkpoint reads{more}"
    )
    parser.add_argument(
        "--ema",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="take the moving average of the weights (default: of a file not, of a run's best weights what "
        "they are, of its last ones where it has one)",
    )
    parser.add_argument(
        "--last", action="store_true", help="take the last weights of a run (default: its best ones)"
    )


def add_model(parser: Any) -> None:
    """Add the argument RUN|MODEL, stored as ``named``."""
    parser.add_argument(
        "named",
        nargs="?",
        metavar="RUN|MODEL",
        help="folder of a run, which knows its model, classes and weights; or a model: of evit_ext.models, "
        "or any of timm's that evit_ext.apply supports",
    )


def add_output(parser: Any, metavar: str, text: str) -> None:
    """Add ``-o`` and ``--output``, a path."""
    parser.add_argument("-o", "--output", type=Path, metavar=metavar, help=text)


def add_progress(parser: Any) -> None:
    """Add ``--progress`` and ``--no-progress``."""
    parser.add_argument(
        "--progress", action=argparse.BooleanOptionalAction, default=True, help="show progress"
    )


def add_classes(parser: Any) -> None:
    """Add ``--classes``, a file with the names of the model's classes."""
    parser.add_argument(
        "--classes",
        type=Path,
        metavar="FILE",
        help="text file with the name of a class on each line, in the order of the model's logits (default: "
        "those that the run or the file of weights knows)",
    )


def add_random_weights(parser: Any) -> None:
    """Add ``--random-weights``."""
    parser.add_argument(
        "--random-weights", action="store_true", help="take a model without training, to try things out"
    )


def add_keep_rates(parser: Any, text: str) -> None:
    """Add ``--keep-rate``, stored as ``keep_rates`` in the namespace: numbers, or None if not given."""
    parser.add_argument(
        "--keep-rate", dest="keep_rates", nargs="+", type=keep_rate, metavar="RATE", help=text
    )


def add_device(parser: Any) -> None:
    """Add ``--device``."""
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: auto)")


def chosen_device(options: argparse.Namespace) -> torch.device:
    """Return the device chosen with :func:`add_device`; auto is a GPU if there is one.

    Raises:
        ValueError: a GPU is asked for, but there is none.
    """
    import torch  # here, because it takes a while

    if options.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("there is no GPU that PyTorch can use, for --device cuda")
    return torch.device(options.device)


def engine(text: str) -> str:
    """Return the name of an engine, if it is one."""
    if text not in ENGINES:
        near = nearest(text, ENGINES)
        hint = f"the nearest is {near}" if near else f"expected one of {', '.join(ENGINES)}"
        raise argparse.ArgumentTypeError(f"there is no engine {shown(text)}: {hint}")
    return text


def keep_rate(text: str) -> float:
    """Return a keep rate as a number; its range is checked when it is set."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected numbers such as 0.7, with spaces between them, got {shown(text)}"
        ) from None


def add_options(
    parser: Any, names: Iterable[str] | None = None, defaults: Mapping[str, str] | None = None
) -> None:
    """Add ``--field VALUE`` for fields of :class:`TrainConfig`; fields not given are not in the namespace.

    Args:
        parser: an ArgumentParser or one of its groups.
        names: of the fields; None adds all.
        defaults: the default to show in the help, for fields where the command's differs.
    """
    hints = typing.get_type_hints(TrainConfig)
    for entry in fields(TrainConfig):
        if names is not None and entry.name not in names:
            continue
        hint = hints[entry.name]
        default = _shown({} if entry.default is MISSING else entry.default)
        default = (defaults or {}).get(entry.name, default)
        arguments: dict[str, Any] = {
            "dest": entry.name,
            "default": argparse.SUPPRESS,
            # argparse formats help texts with %.
            "help": entry.metadata["help"].replace("%", "%%") + f" (default: {default})",
        }
        if hint is bool:
            arguments["action"] = argparse.BooleanOptionalAction
        elif typing.get_origin(hint) is dict:
            arguments.update(nargs="*", metavar="NAME=VALUE")
        elif _is_tuple(hint):
            arguments.update(nargs="+", metavar="N")
        else:
            arguments["metavar"] = "TEXT" if _is_text(hint) else "N"
        parser.add_argument(f"--{entry.name.replace('_', '-')}", **arguments)


def overrides(options: argparse.Namespace, wrong: list[str] | None = None) -> dict[str, Any]:
    """Return the fields that were given on the command line, as :func:`load_config` takes them.

    Args:
        options: of the command.
        wrong: gets what cannot be parsed, a sentence each; None raises the first.

    Raises:
        ValueError: an argument is not in the form name=value where that is required, or cannot be parsed.
    """
    given, parsed = vars(options), {}
    for name, hint in typing.get_type_hints(TrainConfig).items():
        try:
            if name in given:
                parsed[name] = _parse(name, given[name], hint)
        except ValueError as error:
            if wrong is None:
                raise
            wrong.append(str(error))
    return parsed


def _parse(name: str, value: Any, hint: Any) -> Any:
    if isinstance(value, bool):
        return value
    if typing.get_origin(hint) is dict:
        pairs = [item.partition("=") for item in value]
        for key, equals, _ in pairs:
            if not equals or not key.isidentifier():
                raise ValueError(f"--{name.replace('_', '-')} takes name=value, got {shown(key + equals)}")
        return {key: _scalar(text) for key, _, text in pairs}
    if isinstance(value, list):
        return None if value == ["none"] else [_scalar(item) for item in value]
    if value.lower() == "none" and type(None) in typing.get_args(hint):
        return None
    return value if _is_text(hint) else _scalar(value)


def _scalar(text: str) -> Any:
    """Parse `text` as YAML: a number, a boolean or a list of them; nothing is executed."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise ValueError(f"{shown(text)} is not a number, a word or a list of them") from None


def _is_text(hint: Any) -> bool:
    return hint is str or (isinstance(hint, types.UnionType) and str in typing.get_args(hint))


def _is_tuple(hint: Any) -> bool:
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return any(typing.get_origin(kind) is tuple for kind in kinds)


def _shown(default: Any) -> str:
    if default is None or default in ({}, ""):
        return "none"
    if isinstance(default, tuple):
        return " ".join(f"{item:g}" for item in default)
    return f"{default:g}" if isinstance(default, float) else str(default)
