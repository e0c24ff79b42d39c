"""The folder of a run of ``evit train``: its configuration, the names of its classes and its weights."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn

from evit_ext.data.classes import read_class_names
from evit_ext.training.config import TrainConfig, load_config
from evit_ext.training.run.checkpoints import RunCheckpoints
from evit_ext.training.run.folder import CLASSES_FILE


def run_of(path: str) -> str | None:
    """Return the folder of the run that a path is or lies in, such as runs/a for runs/a/best.safetensors."""
    given = Path(path)
    for folder in (given, given.parent, given.parent.parent):
        if (folder / "config.yaml").is_file():
            return str(folder)
    return None


def run_config(folder: str, given: Mapping[str, Any]) -> TrainConfig:
    """Return the configuration of a run, with its fields replaced by those of `given`.

    Raises:
        FileNotFoundError, NotADirectoryError: `folder` is not the folder of a run.
        ValueError: a field does not exist or is out of range.
    """
    file = Path(folder) / "config.yaml"
    if Path(folder).is_file():
        raise NotADirectoryError(
            f"{folder} is a file, expected the folder of a run; a file of weights is given with --model NAME "
            f"--checkpoint {folder}"
        )
    if not file.is_file():
        raise FileNotFoundError(f"there is no {file}: {folder} is not the folder of a run")
    # The run's own weights are loaded later, so the ones it started from are not needed.
    return replace(load_config(file, **given), pretrained=False, initial_checkpoint=None)


def run_classes(folder: str) -> list[str] | None:
    """Return the names of a run's classes, in the order of its logits; None if its data has none."""
    file = Path(folder) / CLASSES_FILE
    return read_class_names(file, exact=True) if file.is_file() else None


def file_classes(path: str) -> list[str] | None:
    """Return the names of the classes that a file of weights knows; None if it does not say."""
    try:
        with safe_open(path, "pt") as file:
            names = json.loads((file.metadata() or {}).get("classes", "null"))
    except (SafetensorError, OSError, ValueError):  # of other formats, or none: loading it will say
        return None
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else None


def run_weights(folder: str, last: bool, ema: bool | None) -> tuple[Mapping[str, Any], str]:
    """Return weights of a run, and a description of them.

    Args:
        folder: of the run.
        last: take those of the newest readable checkpoint instead of the best ones.
        ema: with `last`, whether to take the moving average; None takes it if the run has one. Without, None
            takes what is best, and anything else must be what the best weights are.

    Raises:
        FileNotFoundError: there are no weights.
        ValueError: `ema` asks for what there is not.
    """
    best = Path(folder) / "best.safetensors"
    if last or not best.is_file():
        state, words = _newest(folder, ema)
        return (
            state,
            words if last else f"{words} (the run was not evaluated yet, so no weights are its best)",
        )
    with safe_open(str(best), "pt") as file:
        facts = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    is_ema = facts.get("weights") == "ema"
    if ema is not None and ema != is_ema:
        kind = "the moving average" if is_ema else "the model itself"
        raise ValueError(
            f"the best weights of {folder} are of {kind}: leave out --ema and --no-ema, or add --last"
        )
    what = f"{best}, the best: epoch {facts.get('epoch')}, top-1 {float(facts.get('top1', 'nan')):.2f} %"
    return tensors, what + (", moving average" if is_ema else "")


def _newest(folder: str, ema: bool | None) -> tuple[Mapping[str, Any], str]:
    checkpoints = Path(folder) / "checkpoints"
    found = RunCheckpoints(checkpoints).load_latest()
    if found is None:
        raise FileNotFoundError(f"there is no checkpoint in {checkpoints}")
    state, step = found
    average = None if ema is False else state.get("model_ema")
    if ema and average is None:
        raise ValueError(f"{folder} has no moving average of the weights: leave out --ema")
    words = f"{checkpoints}, the last: step {step}" + ("" if average is None else ", moving average")
    return (state["model"] if average is None else average), words


def load_weights(model: nn.Module, weights: Mapping[str, Any], folder: str) -> None:
    """Load weights from :func:`run_weights`; ValueError if they do not fit the model."""
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        # The first line names the class; each further line names something that does not fit.
        said, *others = [" ".join(line.split()) for line in str(error).splitlines()[1:]] or [str(error)]
        more = f" (and {len(others)} more)" if others else ""
        raise ValueError(
            f"the weights of {folder} do not fit the model as it is asked for; its data may have other "
            f"classes, or an option another size: {textwrap.shorten(said, 300)}{more}"
        ) from error
