"""``evit train``: train an EViT, or resume a training."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evit_ext.cli.options import add_options, add_output, add_progress, overrides
from evit_ext.cli.output import going_on_unread, say_next
from evit_ext.cli.train_checks import Checked, check, with_weights
from evit_ext.training.config import TrainConfig, load_config, recipe_names
from evit_ext.training.data_fit import RECIPE
from evit_ext.training.launcher import launched
from evit_ext.training.recipe import raise_problems
from evit_ext.training.waiting import GRACE

if TYPE_CHECKING:
    from evit_ext.training.ranks import Ranks

# The first field of each group of options, in the order of TrainConfig.
_GROUPS = {
    "epochs": "optimisation",
    "model": "model",
    "dataset": "data",
    "augment": "what is done to the images",
    "distillation": "losses",
    "seed": "the run",
}

_EXAMPLES = """examples:
  evit train --data photos                               # photos/cat/*.jpg, photos/dog/*.jpg, ...
  evit train --recipe cluttered-digits
  evit train --recipe imagenet-finetune-30 --data imagenet --keep-rate 0.6
  torchrun --nproc-per-node 8 --no-python evit train --recipe imagenet-300 --data imagenet
  evit train --recipe runs/a/config.yaml -o runs/b
"""


def add_parser(commands: Any) -> None:
    """Add ``evit train`` to the commands."""
    parser = commands.add_parser(
        "train",
        help="train an EViT after a recipe, on one process or many, or go on with a run",
        usage="evit train [--data FOLDER] [--recipe NAME|FILE] [-o FOLDER] [--FIELD VALUE ...]",
        description="Train an EViT. A recipe gives all fields, options change single ones, and the run's\n"
        "folder gets what came of them as config.yaml. The same command goes on with a run\n"
        "that was interrupted. Under torchrun or srun, all processes train together.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--recipe",
        metavar="NAME|FILE",
        help=f"{', '.join(recipe_names())}, or a YAML file of fields (default: {RECIPE} with --data of a "
        "folder of images, which fits batch size, epochs and learning rate to their number)",
    )
    text = "folder of the run (default: runs/ and the name of the recipe, or of the data without a recipe)"
    add_output(parser, "FOLDER", text)
    parser.add_argument(
        "--resume",
        choices=("auto", "never"),
        default="auto",
        help="auto goes on from the folder's newest checkpoint; never refuses a folder that has one "
        "(default: auto)",
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: auto)")
    parser.add_argument(
        "--tensorboard",
        action=argparse.BooleanOptionalAction,
        default="auto",
        help="write TensorBoard's event files (default: where its package is installed)",
    )
    parser.add_argument(
        "--wandb",
        metavar="PROJECT",
        help="write the figures to this project of Weights & Biases, too, whose package must be installed",
    )
    add_progress(parser)
    parser.add_argument("--print-config", action="store_true", help="print all fields as YAML, and stop")
    group = parser
    for entry in fields(TrainConfig):
        if entry.name in _GROUPS:
            group = parser.add_argument_group(_GROUPS[entry.name])
        add_options(group, [entry.name])
    parser.set_defaults(run="evit_ext.cli.train")


def run(options: argparse.Namespace) -> int:
    """Train, after all that is asked for has been checked; returns the exit status."""
    wrong = options.unrecognized
    given = overrides(options, wrong)
    recipe = options.recipe
    if recipe is None and given.get("data") and not given.get("dataset"):
        recipe = RECIPE
    output = options.output or Path("runs") / _name(options, recipe, given)
    if options.print_config and not (recipe == RECIPE and given.get("data")):
        raise_problems(wrong)
        print(load_config(recipe, **given).to_yaml(), end="")
        return 0
    place = launched()
    checked = check(recipe, given, output, 1 if place is None or options.print_config else place[1], wrong)

    from evit_ext.training.ranks import ALONE, join  # here, because it brings torch, which takes seconds

    if options.print_config:
        print(with_weights(checked, given, ALONE).to_yaml(), end="")
        return 0
    with going_on_unread(f"evit train: the run goes on in {output}"):
        try:
            with join(options.device) as ranks:
                checked.config = with_weights(checked, given, ranks)
                return _run(checked, output, ranks, options, _source(recipe, given, checked))
        except _Failed:
            return 1


def _name(options: argparse.Namespace, recipe: str | None, given: Mapping[str, Any]) -> str:
    """Return the name of a run that was given none: that of its data, recipe or model."""
    if options.recipe is None and recipe == RECIPE:
        return Path(given["data"]).resolve().name
    return Path(recipe or given.get("model") or TrainConfig.model).stem


def _source(recipe: str | None, given: Mapping[str, Any], checked: Checked) -> str:
    """Return in words where the settings of a run come from."""
    parts = [str(recipe or "none: the defaults of all fields")]
    if checked.images is not None:
        parts.append(f"fitted to {checked.images:,} images")
    if given:
        parts.append(f"given {', '.join(given)}")
    return "; ".join(parts)


class _Failed(Exception):
    """Training failed and the reason has been printed; leaving `join` with it waits for no other process."""


def _run(checked: Checked, output: Path, ranks: Ranks, options: argparse.Namespace, source: str) -> int:
    # Imported here, because it takes a while.
    from evit_ext.training.ranks import is_lost
    from evit_ext.training.run.run import Run
    from evit_ext.training.run.stopping import Stopped
    from evit_ext.training.run.unreadable import TooManyUnreadable

    run = Run(
        checked.config,
        output,
        ranks,
        options.resume,
        options.progress,
        options.tensorboard,
        options.wandb,
        recipe=source,
        listings=checked.listings,
    )
    checked.listings.clear()  # of millions of images
    try:
        summary = run.train()
    except Stopped as stopped:
        if ranks.is_first:
            print(f"evit train: {stopped}", flush=True)
        # The exit status of a process ended by the signal, for schedulers.
        status = 128 + (stopped.signal or signal.SIGTERM)
        _end_within(GRACE, status)
        return status
    except (FloatingPointError, TooManyUnreadable) as error:  # raised in all processes
        if options.verbose:
            traceback.print_exc()
        if ranks.is_first:
            _tell(f"{error}\n{run.advice()}")
        raise _Failed from error
    except (OSError, RuntimeError) as error:
        one_of_many = f"rank {ranks.rank}: " if ranks.world_size > 1 else ""
        gone = "" if not is_lost(error) else "another process ended or does not answer: "
        if options.verbose:
            traceback.print_exc()
        _tell(f"{one_of_many}{gone}{error}\n{run.advice()}")
        raise _Failed from error
    if ranks.is_first:
        print(summary)
        say_next(
            ["evit", "report", output],
            ["evit", "eval", output],
            ["evit", "visualize", "PHOTO", "--checkpoint", output, "--html", f"{output.name}.html"],
            ["evit", "export", output, "--format", "onnx"],
        )
    return 0


def _end_within(seconds: float, status: int) -> None:
    """End the process if it ends and cannot: it may wait for workers that wait for a dead mount.

    A process that goes on, because it called the command itself, is left alone.
    """

    def watch() -> None:
        until = time.monotonic() + 10 * seconds
        while threading.main_thread().is_alive():
            if time.monotonic() > until:
                return
            time.sleep(0.1)
        time.sleep(seconds)
        os._exit(status)

    threading.Thread(target=watch, daemon=True).start()


def _tell(error: str) -> None:
    print(f"evit train: error: {error}", file=sys.stderr, flush=True)
