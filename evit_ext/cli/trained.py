"""What the commands that take a trained model have in common: which model is meant, and its weights."""

from __future__ import annotations

import argparse

from torch import nn

import evit_ext
from evit_ext.cli import runs
from evit_ext.cli.options import overrides
from evit_ext.training.config import TrainConfig, load_config


def configuration(options: argparse.Namespace) -> TrainConfig:
    """Return the configuration of the model that is asked for.

    Args:
        options: with run_folder and checkpoint, each a path or None, and fields of a configuration.

    Raises:
        ValueError: not exactly one of a run, a checkpoint and pretrained weights is asked for, or a field is
            out of range.
        FileNotFoundError: there is no such run.
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
    """Load the weights that are asked for; return in words which these are.

    Args:
        model: is given them. Pretrained ones it has already.
        options: with run_folder and checkpoint, each a path or None, and ema, True, False or None.

    Raises:
        ValueError: they do not fit, are damaged, or there is no moving average of them.
        FileNotFoundError: there are none.
    """
    if options.checkpoint is not None:
        loaded = evit_ext.load_checkpoint(model, options.checkpoint, use_ema=options.ema, progress=False)
        return str(loaded)
    if options.run_folder is None:
        return "pretrained"
    weights, words = runs.newest_weights(options.run_folder, options.ema)
    runs.load_weights(model, weights, options.run_folder)
    return words
