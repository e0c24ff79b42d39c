"""A trained model as commands name it: a run, a file of weights, or pretrained weights."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import timm
from torch import nn

from evit_ext import models
from evit_ext._util.spelling import unknown_model
from evit_ext.cli import runs
from evit_ext.cli.options import overrides
from evit_ext.data.classes import imagenet_names, names_for_people, read_class_names
from evit_ext.models.by_name import create_evit
from evit_ext.training.config import TrainConfig, load_config
from evit_ext.weights import load_checkpoint


class Loaded(NamedTuple):
    """A description of loaded weights, and how many tensors of the model they did not have."""

    words: str
    missing: int = 0


def name_model(options: argparse.Namespace, name: str | None) -> None:
    """Store what an argument RUN|MODEL names: a run's folder as ``run_folder``, a model as ``model``.

    A file of weights or a folder in ``options.checkpoint`` names its run, too, unless a model is named.

    Raises:
        ValueError: there is neither a run nor a model of that name.
    """
    options.run_folder = None
    if name is not None:
        is_model = name in models.__all__ or timm.is_model(name)
        # A folder may have a model's name without being a run.
        if Path(name).is_dir() and (not is_model or (Path(name) / "config.yaml").is_file()):
            options.run_folder = name
        elif is_model:
            if "model" in options:
                raise ValueError(f"expected one model, got {name} and --model {options.model}")
            options.model = name
        elif Path(name).is_file():
            raise NotADirectoryError(
                f"{name} is a file, expected the folder of a run or a model's name; a file of weights is "
                f"given as MODEL --checkpoint {name}"
            )
        elif os.sep in name or "model" in options:
            raise FileNotFoundError(f"there is no folder {name}, nor a model of that name")
        else:
            raise ValueError(
                f"{unknown_model(name, models.__all__, timm.list_models())}, and there is no folder {name}"
            )
    if options.run_folder is None and options.checkpoint is not None and "model" not in options:
        options.run_folder = runs.run_of(options.checkpoint)
    if options.checkpoint is not None and Path(options.checkpoint).is_dir():
        if options.run_folder != options.checkpoint:
            raise IsADirectoryError(f"{options.checkpoint} is a folder: expected a file of weights, or a run")
        options.checkpoint = None


def configuration(options: argparse.Namespace) -> TrainConfig:
    """Return the configuration of the requested model.

    Args:
        options: after :func:`name_model`; with run_folder and checkpoint, each a path or None, random_weights
            if the command has it, and fields of a configuration.

    Raises:
        ValueError: the options do not name exactly one of a run, a checkpoint, pretrained and random weights,
            or a field is out of range.
        FileNotFoundError: the run does not exist.
    """
    given = overrides(options)
    random = getattr(options, "random_weights", False)
    pretrained = bool(given.get("pretrained"))
    ways = [options.run_folder is not None or options.checkpoint is not None, random, pretrained]
    if sum(ways) != 1:
        others = ", --random-weights" if "random_weights" in options else ""
        raise ValueError(
            f"expected a run's folder, or a model with one of --checkpoint FILE, --pretrained{others}; "
            + ("got none of these" if not any(ways) else "got more than one of these")
        )
    if options.run_folder is None:
        if options.last:
            raise ValueError("--last is for the weights of a run")
        if options.checkpoint is None and options.ema is not None:
            raise ValueError("--ema and --no-ema are for the weights of a run or of a file")
        return load_config(**given)
    return runs.run_config(options.run_folder, given)


def class_names(options: argparse.Namespace, config: TrainConfig) -> list[str] | None:
    """Return the names of the model's classes: of --classes, else of the run, the file of weights or digits.

    Raises:
        OSError, ValueError: the file of --classes cannot be read.
    """
    if getattr(options, "classes", None) is not None:
        return read_class_names(options.classes)
    names = runs.run_classes(options.run_folder) if options.run_folder is not None else None
    if names is None and options.checkpoint is not None:
        names = runs.file_classes(options.checkpoint)
    return [str(digit) for digit in range(10)] if names is None and is_of_digits(config) else names


def shown_names(names: list[str] | None, num_classes: int) -> list[str] | None:
    """Return how classes are shown to people; without names, ImageNet's where their number is ImageNet's.

    Raises:
        ValueError: there are not as many names as classes.
    """
    if names is None:
        return imagenet_names(num_classes)
    if len(names) != num_classes:
        raise ValueError(f"expected a name for each of {num_classes} classes, got {len(names)} names")
    return names_for_people(names)


def load_weights(model: nn.Module, options: argparse.Namespace) -> Loaded:
    """Load the requested weights.

    Args:
        model: receives the weights. Pretrained weights it already has.
        options: as of :func:`configuration`; with ema, True, False or None, and last.

    Raises:
        ValueError: the weights do not fit, are damaged, or have no moving average.
        FileNotFoundError: there are no weights.
    """
    if options.checkpoint is not None:
        if options.last:
            raise ValueError("--last is for a run without --checkpoint")
        loaded = load_checkpoint(model, options.checkpoint, use_ema=options.ema, progress=False)
        return Loaded(str(loaded), len(loaded.missing_keys))
    if getattr(options, "random_weights", False):
        return Loaded("random")
    if options.run_folder is None:
        return Loaded("pretrained")
    weights, words = runs.run_weights(options.run_folder, options.last, options.ema)
    runs.load_weights(model, weights, options.run_folder)
    return Loaded(words)


def check_classes(config: TrainConfig, model: Any) -> None:
    """Raise ValueError if the pretrained weights are for other classes, which makes the head random."""
    known = (getattr(model, "pretrained_cfg", None) or {}).get("num_classes", model.num_classes)
    if config.pretrained and known != model.num_classes:
        raise ValueError(
            f"the pretrained weights of {config.model} know {known} classes, {model.num_classes} are asked "
            "for by the data or --num-classes: the logits would be random; train the model first (evit train)"
        )


def build(config: TrainConfig, options: argparse.Namespace, names: list[str] | None) -> nn.Module:
    """Return the model of a configuration, with random or pretrained weights.

    Args:
        config: as :func:`configuration` returns it. If it has no number of classes, `names` give it, or the
            head of the run's weights.
        options: as of :func:`configuration`.
        names: of the model's classes, or None.

    Raises:
        TypeError, ValueError: as :func:`evit_ext.models.by_name.create_evit`; or the number of classes is
            unknown, or differs from that of the pretrained weights.
    """
    classes = config.num_classes
    if classes is None and options.run_folder is not None:
        classes = len(names) if names is not None else _classes_of_head(options)
    sizes = {"img_size": config.img_size, "num_classes": classes}
    given = {name: size for name, size in sizes.items() if size is not None}
    model = create_evit(
        config.model,
        config.keep_rate,
        config.drop_loc,
        config.fuse_token,
        config.rule,
        config.rule_args,
        pretrained=config.pretrained,
        **{**config.model_args, **given},
    )
    check_classes(config, model)
    return model


def _classes_of_head(options: argparse.Namespace) -> int:
    state: Mapping[str, Any] = runs.run_weights(options.run_folder, options.last, options.ema)[0]
    heads = [state[key] for key in ("head.weight", "head.fc.weight") if key in state]
    if not heads:
        raise ValueError("the run's weights do not tell the number of its classes: give --num-classes")
    return len(heads[0])


def is_of_digits(config: TrainConfig) -> bool:
    """Return whether a model was trained on the digits that come with scikit-learn."""
    return config.dataset in ("digits", "cluttered-digits")


def preparation(config: TrainConfig) -> dict[str, Any]:
    """Return the settings, by timm's names, in which the preparation of a model's images differs."""
    image: dict[str, Any] = {}
    if is_of_digits(config):
        from evit_ext.data.digits import MEAN, STD

        image = {"mean": (MEAN,) * 3, "std": (STD,) * 3, "crop_pct": 1.0}
    if config.crop_pct is not None:
        image["crop_pct"] = config.crop_pct
    return image
