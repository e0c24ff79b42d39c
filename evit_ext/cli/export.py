"""``evit export``: a model as a file that runs elsewhere."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import timm
import timm.data
import torch
from torch import nn

from evit_ext.cli.output import check_writable, say_next, words_for
from evit_ext.cli.runs import run_config
from evit_ext.cli.trained import build, class_names, configuration, load_weights, name_model, preparation
from evit_ext.patching.keep_rates import keep_rates, set_keep_rate
from evit_ext.training.config import TrainConfig
from evit_ext.weights import save_pretrained


def run(options: argparse.Namespace) -> None:
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
    _check_int8(options)
    config, model, source, classes = _trained(options)
    if options.keep_rates is not None:
        rates: Any = options.keep_rates
        set_keep_rate(model, rates[0] if len(rates) == 1 else rates)
    if classes is None and config.pretrained:
        classes = _imagenet_classes(model)
    endings = {**FORMATS, "aoti": "-aoti.pt2", "hf": "-hf"}  # pt2 has the same ending as aoti
    name = config.model.replace("/", "-") + ("-int8" if options.int8 else "")
    file = options.output or Path(name + endings[options.format])
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
        calibration=options.calibration,
        **(
            {}
            if options.calibration_images is None
            else {"max_calibration_images": options.calibration_images}
        ),
    )
    if options.json:
        files = {"file": str(exported.file), "files": [str(file) for file in exported.files]}
        print(json.dumps({**asdict(exported), **files, "weights": source}, indent=2))
        return
    metadata = exported.metadata
    batches = " and ".join(map(str, exported.batches))
    print(f"model: {config.model}, keep rate {_said(metadata.keep_rate)}")
    print(f"weights: {source}")
    print(f"images: {' x '.join(map(str, metadata.input_size))}")
    size = sum(written.stat().st_size for written in exported.files) / 2**20
    print(f"written: {' and '.join(map(str, exported.files))}, {options.format}, {size:.1f} MiB")
    found = exported.agreement
    if found is None:
        print(
            f"compared with the model at batches of {batches}: differs by at most "
            f"{exported.max_difference:.2g}"
        )
    else:
        print(
            f"int8, calibrated on {found.calibrated_on} images and compared with the model on {found.images} "
            f"others: the same class for {100 * found.same_class:.1f} %, cosine of the logits "
            f"{found.cosine:.3f} (least {found.least_cosine:.3f})"
        )
    named = "" if classes is None else f"{len(classes)} names in it"
    print(f"classes: {named or 'without names; to give them: --classes FILE'}")
    words = words_for(options, config.model)
    if metadata.quantization is not None and not options.random_weights:
        engine = "openvino" if options.format == "openvino" else "onnxruntime"
        say_next(["evit", "eval", *words, "--engine", engine, "--exported", file])
        return
    say_next(["evit", "benchmark", words[0]], ["evit", "export", *words, "--format", "hf"])


def _check_int8(options: argparse.Namespace) -> None:
    """Raise ValueError unless there is what a file of int8 needs, and nothing that only such a file needs."""
    if not options.int8:
        if options.calibration is not None or options.calibration_images is not None:
            raise ValueError("--calibration and --calibration-images are for --int8")
        return
    if options.format not in ("onnx", "openvino"):
        raise ValueError(f"--int8 is for --format onnx and openvino, got --format {options.format}")
    if options.calibration is None:
        data = None if options.run_folder is None else run_config(options.run_folder, {}).data
        own = (
            "" if data is None else f", for instance those that the run was trained on: --calibration {data}"
        )
        raise ValueError(
            "--int8 needs images like those that the model will see: give a folder of them with "
            f"--calibration{own}"
        )
    if options.calibration_images is not None and options.calibration_images < 4:
        raise ValueError(f"--calibration-images must be at least 4, got {options.calibration_images}")


def _said(rates: Sequence[float]) -> str:
    return " ".join(f"{rate:g}" for rate in rates) or "none, as its rule has none"


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
    print(f"written: {folder}, keep rate {_said(rates)}")
    print(f"to load it: evit_ext.from_pretrained({str(folder)!r})")
    say_next(["hf", "upload", "OWNER/NAME", folder])


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
