"""``evit export``: a model as a file that runs elsewhere."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import timm
import timm.data
import torch
from torch import nn

from evit_ext import models
from evit_ext.cli.options import add_keep_rates, add_options, add_weights, overrides
from evit_ext.cli.runs import newest_weights
from evit_ext.cli.trained import build, configuration, is_of_digits, load_weights, preparation
from evit_ext.models.by_name import unknown_model
from evit_ext.patching.keep_rates import keep_rates, set_keep_rate
from evit_ext.training.config import TrainConfig, load_config
from evit_ext.weights import save_pretrained

#: The fields of a configuration that define the model; the keep rate has its own option.
_FIELDS = ("model_args", "img_size", "num_classes", "drop_loc", "fuse_token", "pretrained", "crop_pct")

_FORMATS = ("pt2", "onnx", "aoti", "hf")

_EXAMPLES = """examples:
  evit export runs/small --format onnx
  evit export deit_small --checkpoint evit.pth --keep-rate 0.7 --format aoti --output small.pt2
  evit export runs/small --format hf --output small    # then: hf upload owner/small small
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
    parser.add_argument(
        "model",
        metavar="RUN|MODEL",
        help="folder of a run, or a model: of evit_ext.models, or any of timm's that evit_ext.apply supports",
    )
    parser.add_argument(
        "--format",
        choices=_FORMATS,
        default="pt2",
        help="pt2: a program of torch.export with this package's operators; onnx: standard operators only; "
        "aoti: compiled by AOTInductor for this kind of machine, with this package's operators; hf: a folder "
        "for the Hugging Face hub, which evit_ext.from_pretrained and timm read (default: pt2)",
    )
    parser.add_argument(
        "--output",
        metavar="FILE|FOLDER",
        type=Path,
        help="(default: the model's name and .pt2, .onnx, -aoti.pt2 or -hf)",
    )
    add_weights(parser)
    parser.add_argument(
        "--random-weights", action="store_true", help="export a model without training, to measure its speed"
    )
    add_keep_rates(parser, "in (0, 1], one or one for each stage (default: the configured one)")
    parser.add_argument(
        "--max-batch", type=int, metavar="N", help="the most images at once, at least 2 (default: any number)"
    )
    parser.add_argument("--opset", type=int, metavar="N", help="of --format onnx (default: 20)")
    parser.add_argument(
        "--classes",
        type=Path,
        metavar="FILE",
        help="text file with the name of a class on each line, to be put into the exported file (default: "
        "ImageNet's with --pretrained models of 1000 classes, else none)",
    )
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
    classes = None if options.classes is None else _names(options.classes)
    config, model, source = _trained(options)
    if options.keep_rates is not None:
        rates: Any = options.keep_rates
        set_keep_rate(model, rates[0] if len(rates) == 1 else rates)
    if classes is None and config.pretrained:
        classes = _imagenet_classes(model)
    endings = {**FORMATS, "aoti": "-aoti.pt2", "hf": "-hf"}  # pt2 has the same ending as aoti
    file = options.output or Path(config.model.replace("/", "-") + endings[options.format])
    images = preparation(config)
    if classes is None and is_of_digits(config):
        classes = [str(digit) for digit in range(10)]
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


def _names(file: Path) -> list[str]:
    """Return the lines of a text file."""
    try:
        return file.read_text("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} must be a text file with a class a line, in UTF-8: {error}") from error


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


def _trained(options: argparse.Namespace) -> tuple[TrainConfig, nn.Module, str]:
    """Return the configuration, the model with its weights, and a description of the weights."""
    # A folder may have a model's name without being a run.
    is_model = options.model in models.__all__ or timm.is_model(options.model)
    folder = Path(options.model)
    is_run = folder.is_dir() and (not is_model or (folder / "config.yaml").is_file())
    options.run_folder = options.model if is_run else None
    name = vars(options).pop("model")
    given = overrides(options)
    if not is_run and not is_model:
        if folder.is_file():
            raise ValueError(
                f"{folder} is a file, expected the folder of a run or a model's name; a file of weights is "
                f"given as evit export NAME --checkpoint {folder}"
            )
        where = f"there is no folder {folder}, nor a model of that name" if os.sep in name else ""
        raise ValueError(where or str(unknown_model(name)))
    ways = sum(
        (is_run, options.checkpoint is not None, options.random_weights, bool(given.get("pretrained")))
    )
    if ways != 1:
        raise ValueError(
            "expected a run's folder, or a model with one of --checkpoint FILE, --pretrained and "
            f"--random-weights; got {ways or 'none'} of these"
        )
    if options.ema is not None and (options.random_weights or given.get("pretrained")):
        raise ValueError("--ema and --no-ema are for the weights of a run or of a file")
    state: Any = None
    if is_run:
        config = configuration(options)
        state, _ = newest_weights(options.run_folder, ema=False)
    else:
        config = load_config(model=name, **given)
    torch.manual_seed(config.seed)  # for random weights
    model = build(config, state)
    if options.random_weights:
        return config, model, "random"
    return config, model, load_weights(model, options)


def _imagenet_classes(model: Any) -> list[str] | None:
    """Return the names of ImageNet's classes, or None if the model's logits are for other classes."""
    of_weights = (getattr(model, "pretrained_cfg", None) or {}).get("num_classes")
    if of_weights != 1000 or model.num_classes != 1000:
        return None
    info = timm.data.ImageNetInfo("imagenet-1k")
    return [info.index_to_description(index) for index in range(info.num_classes())]
