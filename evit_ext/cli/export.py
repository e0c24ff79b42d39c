"""``evit export``: a model as a file that runs elsewhere."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import timm
import timm.data
import torch
from torch import nn

from evit_ext.cli.options import (
    add_classes,
    add_keep_rates,
    add_model,
    add_options,
    add_output,
    add_random_weights,
    add_weights,
)
from evit_ext.cli.output import check_writable
from evit_ext.cli.trained import build, class_names, configuration, load_weights, name_model, preparation
from evit_ext.patching.keep_rates import keep_rates, set_keep_rate
from evit_ext.training.config import TrainConfig
from evit_ext.weights import save_pretrained

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

_FORMATS = ("pt2", "onnx", "aoti", "hf")

_EXAMPLES = """examples:
  evit export runs/small --format onnx
  evit export deit_small --checkpoint evit.pth --keep-rate 0.7 --format aoti -o small.pt2
  evit export runs/small --format hf -o small    # then: hf upload owner/small small
"""


def add_parser(commands: Any) -> None:
    """Add ``evit export`` to the commands."""
    parser = commands.add_parser(
        "export",
        help="write a model to a file: torch.export, ONNX or AOTInductor; or for the Hugging Face hub",
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
        "aoti: compiled by AOTInductor for this kind of machine, with this package's operators; hf: a folder "
        "for the Hugging Face hub, which evit_ext.from_pretrained and timm read (default: pt2)",
    )
    add_output(parser, "FILE|FOLDER", "(default: the model's name and .pt2, .onnx, -aoti.pt2 or -hf)")
    add_weights(parser)
    add_random_weights(parser)
    add_keep_rates(parser, "in (0, 1], one or one for each stage (default: the configured one)")
    parser.add_argument(
        "--max-batch", type=int, metavar="N", help="the most images at once, at least 2 (default: any number)"
    )
    parser.add_argument("--opset", type=int, metavar="N", help="of --format onnx (default: 20)")
    add_classes(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_options(parser.add_argument_group("model, as in a run's configuration"), _FIELDS)
    parser.set_defaults(run=_export)


def _export(options: argparse.Namespace) -> None:
    # Imported here, because it takes longer than other commands should wait.
    from evit_ext.export import FORMATS, export_model

    # Checked first, so that a mistake is reported before a model is built.
    if options.format == "hf" and options.max_batch is not None:
        raise ValueError("--max-batch is for files, and not for --format hf, whose model takes any number")
    if options.format != "onnx" and options.opset is not None:
        raise ValueError(f"--opset is for --format onnx, got --format {options.format}")
    if options.output is not None:
        check_writable(options.output)
    name_model(options, options.named)
    config, model, source, classes = _trained(options)
    if options.keep_rates is not None:
        rates: Any = options.keep_rates
        set_keep_rate(model, rates[0] if len(rates) == 1 else rates)
    if classes is None and config.pretrained:
        classes = _imagenet_classes(model)
    endings = {**FORMATS, "aoti": "-aoti.pt2", "hf": "-hf"}  # pt2 has the same ending as aoti
    file = options.output or Path(config.model.replace("/", "-") + endings[options.format])
    images = preparation(config)
    if options.format == "hf":
        _write_folder(model, file, classes, images, source, options.json)
        return
    exported = export_model(
        model.eval(),
        file,
        options.format,
        name=config.model,
        image_size=config.img_size,
        classes=classes,
        **images,
        max_batch=options.max_batch,
        opset=20 if options.opset is None else options.opset,
    )
    if options.json:
        print(json.dumps({**asdict(exported), "file": str(exported.file), "weights": source}, indent=2))
        return
    metadata = exported.metadata
    batches = " and ".join(map(str, exported.batches))
    print(f"model: {config.model}, keep rate {' '.join(f'{rate:g}' for rate in metadata.keep_rate)}")
    print(f"weights: {source}")
    print(f"images: {' x '.join(map(str, metadata.input_size))}")
    print(f"written: {file}, {options.format}, {file.stat().st_size / 2**20:.1f} MiB")
    print(
        f"compared with the model at batches of {batches}: differs by at most {exported.max_difference:.2g}"
    )
    named = "" if classes is None else f"{len(classes)} names in it"
    print(f"classes: {named or 'without names; to give them: --classes FILE'}")


def _write_folder(
    model: nn.Module,
    folder: Path,
    classes: list[str] | None,
    images: dict[str, Any],
    source: str,
    as_json: bool,
) -> None:
    """Write a model's folder for the hub, and report it."""
    save_pretrained(model, folder, label_names=classes, pretrained_cfg=images)
    rates = keep_rates(model)
    if as_json:
        facts = {"file": str(folder), "format": "hf", "keep_rate": rates, "weights": source}
        print(json.dumps(facts, indent=2))
        return
    print(f"weights: {source}")
    print(f"written: {folder}, keep rate {' '.join(f'{rate:g}' for rate in rates)}")
    print(f"to load it: evit_ext.from_pretrained({str(folder)!r}); to the hub: hf upload OWNER/NAME {folder}")


def _trained(options: argparse.Namespace) -> tuple[TrainConfig, nn.Module, str, list[str] | None]:
    """Return the configuration, the model with its weights, a description of these, and its class names."""
    config = configuration(options)
    names = class_names(options, config)
    torch.manual_seed(config.seed)  # for random weights
    model = build(config, options, names)
    return config, model, load_weights(model, options).words, names


def _imagenet_classes(model: Any) -> list[str] | None:
    """Return the names of ImageNet's classes, or None if the model's logits are for other classes."""
    of_weights = (getattr(model, "pretrained_cfg", None) or {}).get("num_classes")
    if of_weights != 1000 or model.num_classes != 1000:
        return None
    info = timm.data.ImageNetInfo("imagenet-1k")
    return [info.index_to_description(index) for index in range(info.num_classes())]
