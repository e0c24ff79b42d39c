"""The options of ``evit eval``."""

from __future__ import annotations

import argparse
from typing import Any

from evit_ext._util.choices import ENGINES
from evit_ext.cli.options import (
    add_classes,
    add_device,
    add_keep_rates,
    add_model,
    add_options,
    add_output,
    add_progress,
    add_weights,
    engine,
)

#: The fields of a configuration that matter for an evaluation; the keep rate has its own option.
_FIELDS = (
    "model",
    "model_args",
    "img_size",
    "num_classes",
    "drop_loc",
    "fuse_token",
    "rule",
    "rule_args",
    "pretrained",
    "dataset",
    "data",
    "val_split",
    "val_fraction",
    "difficulty",
    "workers",
    "max_image_pixels",
    "crop_pct",
    "seed",
    "precision",
)

_EXAMPLES = """examples:
  evit eval runs/small --keep-rate 1 0.7 0.5
  evit eval runs/small --last --data other-photos
  evit eval deit_small --checkpoint evit.pth --data imagenet
  evit eval vit_small_patch16_224 --pretrained --keep-rate 1 0.7 --data imagenet
  evit eval runs/small --engine openvino --exported small-int8.xml
  torchrun --nproc-per-node 8 --no-python evit eval runs/imagenet-300
"""


def add_parser(commands: Any) -> None:
    """Add ``evit eval`` to the commands."""
    parser = commands.add_parser(
        "eval",
        help="accuracy, speed and cost of a trained model, at several keep rates",
        description="Evaluate what a run has trained, or a model with the weights of a file or its\n"
        "pretrained ones, on the validation split. Under torchrun or srun, the processes share\n"
        "the images, and each counts once.",
        usage="evit eval RUN|MODEL [--checkpoint FILE | --pretrained] [--data FOLDER] [OPTION ...]",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model(parser)
    add_weights(parser)
    add_classes(parser)
    add_output(parser, "FILE", "write the figures there, too, as JSON")
    add_keep_rates(parser, "each in (0, 1], a row each (default: the configured one)")
    parser.add_argument(
        "--batch-size",
        dest="at_once",
        type=int,
        default=64,
        metavar="N",
        help="images that a process takes at once (default: 64)",
    )
    parser.add_argument(
        "--repeats",
        type=int,
        default=5,
        metavar="N",
        help="timed batches a row, for the images/s of the model alone; 0 leaves it out (default: 5)",
    )
    parser.add_argument(
        "--engine",
        type=engine,
        default="torch",
        metavar="NAME",
        help=f"what computes the logits: {', '.join(ENGINES)} (default: torch)",
    )
    parser.add_argument(
        "--exported",
        metavar="FILE",
        help="of evit export, to be evaluated with --engine onnxruntime or openvino, at its own keep rate "
        "(default: a file made for the evaluation)",
    )
    add_device(parser)
    add_progress(parser)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    add_options(parser.add_argument_group("model and data, as in a run's configuration"), _FIELDS)
    parser.set_defaults(run="evit_ext.cli.evaluate")
