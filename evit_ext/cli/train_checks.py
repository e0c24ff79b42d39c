"""What ``evit train`` finds wrong before it begins, all at once, and the settings that nobody has chosen."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm

from evit_ext import models
from evit_ext.cli.output import check_writable
from evit_ext.data.order import steps_per_epoch
from evit_ext.models.by_name import unknown_model
from evit_ext.training.config import TrainConfig, load_config
from evit_ext.training.data_fit import FITTED, RECIPE, fit_to_data
from evit_ext.training.data_sets import open_data, size_of
from evit_ext.training.hub import missing_weights
from evit_ext.training.ranks import Ranks
from evit_ext.training.recipe import raise_problems
from evit_ext.training.run.checkpoints import RunCheckpoints
from evit_ext.weights.source import HUB_PREFIXES

# The fields that are checked even where others are wrong.
_ABOUT_DATA = (
    "dataset", "data", "train_split", "val_split", "val_fraction", "num_classes", "initial_checkpoint",
    "teacher_checkpoint", "oracle_checkpoint", "token_labels",
)  # fmt: skip


def checked_config(recipe: str | None, given: Mapping[str, Any], output: Path, ranks: Ranks) -> TrainConfig:
    """Return the configuration of a run, with settings that fit its data where nobody has chosen them.

    Every process must call it.

    Args:
        recipe: name or file, or None.
        given: the fields that were given.
        output: folder of the run; if there is one that was interrupted, it has chosen already.
        ranks: the processes.

    Raises:
        ValueError: with all that is wrong with the fields, the data and the folder.
    """
    problems: list[str] = []
    # What is fitted below must not contradict what is given before it is fitted.
    before = {"warmup_epochs": 0.0} if recipe == RECIPE else {}
    config = _attempt(problems, lambda: load_config(recipe, **{**before, **given}))
    if config is not None and config.dataset == "" and recipe == RECIPE:
        config = _attempt(problems, lambda: _fitted(config, given, output, ranks))
    elif config is not None:
        problems += _wrong_data(config, ranks)
    else:
        data = {name: given[name] for name in _ABOUT_DATA if name in given}
        about_data = _attempt([], lambda: load_config(None, batch_size=1, warmup_epochs=0.0, **data))
        if about_data is not None:
            problems += _wrong_data(about_data, ranks, hub=False)
    model = given.get("model", "deit_small") if config is None else config.model
    if not _is_model(model):
        problems.insert(0, str(unknown_model(model)))
    _attempt(problems, lambda: _check_output(output))
    raise_problems(problems)
    assert config is not None
    return config


def _attempt(problems: list[str], call: Any) -> Any:
    try:
        return call()
    except (ValueError, TypeError, OSError, ModuleNotFoundError) as error:
        problems += [line.strip() for line in str(error).splitlines() if "things are wrong:" not in line]
        return None


def _fitted(config: TrainConfig, given: Mapping[str, Any], output: Path, ranks: Ranks) -> TrainConfig:
    before = _interrupted(output)
    if before is not None:
        return replace(config, **{name: getattr(before, name) for name in FITTED if name not in given})
    train, _ = open_data(config, training=True)
    images = size_of(train) if train is not None else None
    assert images is not None
    reason = ""
    if config.pretrained and config.initial_checkpoint is None and config.oracle is None:
        reason = ranks.gather(missing_weights(config.model, config.model_args))[0]
    if reason and given.get("pretrained"):
        raise ValueError(_no_weights(config.model, reason))
    wants = config.pretrained and not reason
    fitted = fit_to_data(config, given, images, wants, ranks.world_size)
    problems = _wrong_data(fitted, ranks, hub=False)
    raise_problems(problems)
    if reason and ranks.is_first:
        print(
            f"the pretrained weights of {config.model} cannot be had ({reason}): training from random ones, "
            "which takes far more images to be good; weights of a file: --initial-checkpoint FILE",
            file=sys.stderr,
            flush=True,
        )
    return fitted


def _interrupted(output: Path) -> TrainConfig | None:
    """Return the configuration of the run that a folder has checkpoints of; None without one."""
    if not RunCheckpoints(output / "checkpoints").steps() or not (output / "config.yaml").is_file():
        return None
    return load_config(output / "config.yaml")


def _wrong_data(config: TrainConfig, ranks: Ranks, hub: bool = True) -> list[str]:
    """Return what is wrong with the data of a folder, with its size, and with files that are named."""
    problems: list[str] = []
    _attempt(problems, lambda: config.micro_batches(ranks.world_size))
    if config.dataset == "" and config.data is not None:
        opened = _attempt(problems, lambda: open_data(config, training=True))
        images = None if opened is None else size_of(opened[0])
        if images is not None:
            _attempt(problems, lambda: steps_per_epoch(images, config.batch_size))
        found = 0 if opened is None else len(opened[0].classes)
        if found == 1:
            problems.append(
                f"{opened[0].source} has one class only, {next(iter(opened[0].classes))}: expected a folder "
                "for each of two classes or more"
            )
        if config.num_classes is not None and config.num_classes < found:
            problems.append(f"num_classes is {config.num_classes}, but the data has {found} classes")
    for name in ("initial_checkpoint", "teacher_checkpoint", "oracle_checkpoint", "token_labels"):
        path = getattr(config, name)
        is_file = path is not None and "://" not in path and not path.startswith(HUB_PREFIXES)
        if is_file and not Path(path).expanduser().exists():
            problems.append(f"{name}: there is no {path} in {Path.cwd()}")
    if hub and config.pretrained and not problems and _is_model(config.model):
        reason = ranks.gather(missing_weights(config.model, config.model_args))[0]
        if reason:
            problems.append(_no_weights(config.model, reason))
    return problems


def _no_weights(model: str, reason: str) -> str:
    return (
        f"the pretrained weights of {model} cannot be had ({reason}): start from a file with --no-pretrained "
        "--initial-checkpoint FILE, or from random weights with --no-pretrained"
    )


def _is_model(name: str) -> bool:
    return name in models.__all__ or bool(timm.is_model(name))


def _check_output(output: Path) -> None:
    if output.exists() and not output.is_dir():
        raise NotADirectoryError(f"{output}: is a file, expected a run's folder")
    check_writable(output / "config.yaml")
