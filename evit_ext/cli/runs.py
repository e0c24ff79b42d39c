"""The folder of a run of ``evit train``: its configuration and its newest weights."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from evit_ext.training.config import TrainConfig, load_config
from evit_ext.training.run_checkpoints import RunCheckpoints


def run_config(folder: str, given: Mapping[str, Any]) -> TrainConfig:
    """Return the configuration of a run, with the fields of `given` in the place of its own.

    Raises:
        FileNotFoundError, NotADirectoryError: it is not the folder of a run.
        ValueError: a field that there is not, or out of its range.
    """
    file = Path(folder) / "config.yaml"
    if Path(folder).is_file():
        raise NotADirectoryError(
            f"{folder} is a file, expected the folder of a run; a file of weights is given with --model NAME "
            f"--checkpoint {folder}"
        )
    if not file.is_file():
        raise FileNotFoundError(f"there is no {file}: {folder} is not the folder of a run")
    # The run's own weights are loaded afterwards, whatever it started from.
    return replace(load_config(file, **given), pretrained=False, initial_checkpoint=None)


def newest_weights(folder: str, ema: bool | None) -> tuple[Mapping[str, Any], str]:
    """Return the newest weights of a run that can be read, and in words which these are.

    Args:
        folder: of the run.
        ema: the moving average of the weights; None takes it where the run has one.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: `ema` is True and there is no moving average.
    """
    checkpoints = Path(folder) / "checkpoints"
    found = RunCheckpoints(checkpoints).load_latest()
    if found is None:
        raise FileNotFoundError(f"there is no checkpoint in {checkpoints}")
    state, step = found
    average = None if ema is False else state.get("model_ema")
    if ema and average is None:
        raise ValueError(f"{folder} has no moving average of the weights: leave out --ema")
    words = f"{checkpoints}, step {step}" + ("" if average is None else ", moving average")
    return (state["model"] if average is None else average), words


def load_weights(model: nn.Module, weights: Mapping[str, Any], folder: str) -> None:
    """Load what :func:`newest_weights` returned; ValueError if it does not fit the model."""
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        # The first line names the class, each other one something that does not fit.
        said, *others = [" ".join(line.split()) for line in str(error).splitlines()[1:]] or [str(error)]
        more = f" (and {len(others)} more)" if others else ""
        raise ValueError(
            f"the weights of {folder} do not fit the model as it is asked for; its data may have other "
            f"classes, or an option another size: {textwrap.shorten(said, 300)}{more}"
        ) from error
