"""The folder of a run of ``evit train``: its configuration and its newest weights."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from evit_ext.training.config import TrainConfig, load_config
from evit_ext.training.run.checkpoints import RunCheckpoints


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


def newest_weights(folder: str, ema: bool | None) -> tuple[Mapping[str, Any], str]:
    """Return the newest readable weights of a run, and a description of them.

    Args:
        folder: of the run.
        ema: whether to take the moving average of the weights; None takes it if the run has one.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: `ema` is True but there is no moving average.
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
    """Load weights from :func:`newest_weights`; ValueError if they do not fit the model."""
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
