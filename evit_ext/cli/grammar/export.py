"""The options of ``evit export``."""

from __future__ import annotations

import argparse
from typing import Any

from evit_ext.cli.options import (
    add_classes,
    add_keep_rates,
    add_model,
    add_options,
    add_output,
    add_random_weights,
    add_weights,
)

#: The fields of a configuration that define the model; the keep rate has its own option.
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
    "crop_pct",
)

_FORMATS = ("pt2", "onnx", "openvino", "aoti", "hf")

_EXAMPLES = """examples:
  evit export runs/small --format onnx
  evit export deit_small --checkpoint evit.pth --keep-rate 0.7 --format aoti -o small.pt2
  evit export runs/small --format openvino --int8 --calibration photos/train
  evit export runs/small --format hf -o small    # then: hf upload owner/small small
"""


def add_parser(commands: Any) -> None:
    """Add ``evit export`` to the commands."""
    parser = commands.add_parser(
        "export",
        help="write a model to a file: torch.export, ONNX, OpenVINO, AOTInductor; or for Hugging Face's hub",
        description="Write a model, at one keep rate and for batches of any size, to a file that runs\n"
        "without this package's Python. The file is loaded again and compared with the model\n"
        "before it has its name; what cannot be exported is refused with the reason.",
        usage="evit export RUN|MODEL [--format FORMAT] [--checkpoint FILE | --pretrained] [OPTION ...]",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model(parser)
    parser.add_argument(
        "--format",
        choices=_FORMATS,
        default="pt2",
        help="pt2: a program of torch.export with this package's operators; onnx: standard operators only; "
        "openvino: the same as OpenVINO's .xml and .bin; aoti: compiled by AOTInductor for this kind of "
        "machine, with this package's operators; hf: a folder for the Hugging Face hub, which "
        "evit_ext.from_pretrained and timm read (default: pt2)",
    )
    add_output(
        parser,
        "FILE|FOLDER",
        "(default: the model's name and .pt2, .onnx, .xml, -aoti.pt2 or -hf, with -int8 before it)",
    )
    add_weights(parser)
    add_random_weights(parser)
    add_keep_rates(parser, "in (0, 1], one or one for each stage (default: the configured one)")
    parser.add_argument(
        "--max-batch", type=int, metavar="N", help="the most images at once, at least 2 (default: any number)"
    )
    parser.add_argument("--opset", type=int, metavar="N", help="of --format onnx (default: 20)")
    parser.add_argument(
        "--int8",
        action="store_true",
        help="quantise the products with weights, for --format onnx and openvino; needs --calibration",
    )
    parser.add_argument(
        "--calibration",
        metavar="FOLDER",
        help="of images like those that the model will see, from which --int8 takes the ranges of "
        "activations; one in four is kept to compare the two models on",
    )
    parser.add_argument(
        "--calibration-images", type=int, metavar="N", help="of the folder at most (default: 128)"
    )
    add_classes(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_options(parser.add_argument_group("model, as in a run's configuration"), _FIELDS)
    parser.set_defaults(run="evit_ext.cli.export")
