"""Shared by the commands that take a trained model: finding the model and its weights."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from torch import nn

from evit_ext.cli import runs
from evit_ext.cli.options import overrides
from evit_ext.models.by_name import create_evit
from evit_ext.training.config import TrainConfig, load_config
from evit_ext.weights import load_checkpoint


def configuration(options: argparse.Namespace) -> TrainConfig:
    """Return the configuration of the requested model.

    Args:
        options: with run_folder and checkpoint, each a path or None, and fields of a configuration.

    Raises:
        ValueError: the options do not name exactly one of a run, a checkpoint and pretrained weights, or a
            field is out of range.
        FileNotFoundError: the run does not exist.
    """
    given = overrides(options)
    if options.run_folder is not None:
        if options.checkpoint is not None or given.get("pretrained"):
            raise ValueError("expected a run, or --checkpoint, or --pretrained; got more than one of them")
        return runs.run_config(options.run_folder, given)
    if (options.checkpoint is None) == (not given.get("pretrained")):
        raise ValueError("expected a run, or --model with either --checkpoint FILE or --pretrained")
    return load_config(**given)


def load_weights(model: nn.Module, options: argparse.Namespace) -> str:
    """Load the requested weights; return a description of them.

    Args:
        model: receives the weights. Pretrained weights it already has.
        options: with run_folder and checkpoint, each a path or None, and ema, True, False or None.

    Raises:
        ValueError: the weights do not fit, are damaged, or have no moving average.
        FileNotFoundError: there are no weights.
    """
    if options.checkpoint is not None:
        loaded = load_checkpoint(model, options.checkpoint, use_ema=options.ema, progress=False)
        return str(loaded)
    if options.run_folder is None:
        return "pretrained"
    weights, words = runs.newest_weights(options.run_folder, options.ema)
    runs.load_weights(model, weights, options.run_folder)
    return words


def check_classes(config: TrainConfig, model: Any) -> None:
    """Raise ValueError if the pretrained weights are for other classes, which makes the head random."""
    known = (getattr(model, "pretrained_cfg", None) or {}).get("num_classes", model.num_classes)
    if config.pretrained and known != model.num_classes:
        raise ValueError(
            f"the pretrained weights of {config.model} know {known} classes, {model.num_classes} are asked "
            "for by the data or --num-classes: the logits would be random; train the model first (evit train)"
        )


def build(config: TrainConfig, state: Mapping[str, Any] | None = None) -> nn.Module:
    """Return the model of a configuration, with random or pretrained weights.

    Args:
        config: as :func:`configuration` returns it.
        state: weights of its run. If the configuration has no number of classes, their head gives it.

    Raises:
        TypeError, ValueError: as :func:`evit_ext.models.by_name.create_evit`; or the number of classes is
            unknown, or differs from that of the pretrained weights.
    """
    classes = config.num_classes
    if classes is None and state is not None:
        heads = [state[key] for key in ("head.weight", "head.fc.weight") if key in state]
        if not heads:
            raise ValueError("the run's weights do not tell the number of its classes: give --num-classes")
        classes = len(heads[0])
    sizes = {"img_size": config.img_size, "num_classes": classes}
    given = {name: size for name, size in sizes.items() if size is not None}
    model = create_evit(
        config.model,
        config.keep_rate,
        config.drop_loc,
        config.fuse_token,
        pretrained=config.pretrained,
        **{**config.model_args, **given},
    )
    check_classes(config, model)
    return model


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
