"""The options of ``evit visualize``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from evit_ext.cli.options import (
    add_classes,
    add_device,
    add_keep_rates,
    add_options,
    add_output,
    add_random_weights,
    add_weights,
)

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
    "max_image_pixels",
    "crop_pct",
)

_EXAMPLES = """examples:
  evit visualize photo.jpg --model deit_small --checkpoint evit.pth -o photo.png
  evit visualize photo.jpg --model vit_small_patch16_224 --pretrained --keep-rate 0.7 0.5
  evit visualize photo.jpg --checkpoint runs/small --html photo.html
  evit visualize holiday/ --checkpoint runs/small -o sheet.png
"""


def add_parser(commands: Any) -> None:
    """Add ``evit visualize`` to the commands."""
    parser = commands.add_parser(
        "visualize",
        help="which patches of a photograph a model keeps, as a picture and as a page",
        description="Show a photograph as the model sees it and, stage by stage, the patches that are kept,\n"
        "what scores they got, and what the model takes it for with all patches and without.\n"
        "Several photographs, or a folder of them, make a contact sheet.",
        usage="evit visualize PHOTO ... --checkpoint RUN | --model NAME (--checkpoint FILE | --pretrained) "
        "[OPTION ...]",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("photos", nargs="+", metavar="PHOTO", help="an image file, or a folder of them")
    text = "write the picture there: .png, .jpg or .webp (default: evit.png, unless there is --html)"
    add_output(parser, "FILE", text)
    parser.add_argument(
        "--html",
        type=Path,
        metavar="FILE",
        help="write a page there, with sliders over stages and keep rates; one file that needs nothing else",
    )
    more = "; or the folder of a run of evit train, which knows its model, classes and weights"
    add_weights(parser, "FILE|RUN", more)
    add_random_weights(parser)
    add_keep_rates(parser, "each in (0, 1] (default: the model's own; with --html 0.9 0.8 0.7 0.6 0.5)")
    add_classes(parser)
    parser.add_argument(
        "--most", type=int, default=64, metavar="N", help="photographs to show of more (default: 64)"
    )
    add_device(parser)
    group = parser.add_argument_group("model, as in a run's configuration")
    add_options(group, _FIELDS, {"model": "the run's; without a run it is needed"})
    parser.set_defaults(run="evit_ext.cli.visualize")
