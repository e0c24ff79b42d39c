"""``evit report``: what became of a run, as one HTML file."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm.data
from torch import nn

from evit_ext._util.files import replacing
from evit_ext.cli.options import chosen_device
from evit_ext.cli.output import check_writable, say_next
from evit_ext.cli.trained import build, class_names, configuration, load_weights, name_model, preparation
from evit_ext.training.config import TrainConfig


def run(options: argparse.Namespace) -> None:
    from evit_ext.report import page
    from evit_ext.report.records import read_run

    if options.images < 0:
        raise ValueError(f"expected --images of at least 0, got {options.images}")
    output = options.output or Path(options.run_folder) / "report.html"
    if output.is_dir():
        raise IsADirectoryError(f"{output} is a folder: give the file to write")
    check_writable(output)
    records = read_run(options.run_folder)
    pictures: list[Any] = []
    weights, notes = "", []
    if options.images:
        try:
            pictures, weights = _pictures(options)
        except (FileNotFoundError, ValueError, ModuleNotFoundError) as error:
            notes.append(f"No pictures: {error}")
            print(f"without pictures: {error}")
    output.parent.mkdir(parents=True, exist_ok=True)
    with replacing(output) as file:
        file.write(page.write(records, pictures, weights, notes))
    print(f"{output}: {len(records.rows)} records, {len(pictures)} images")
    say_next(["evit", "eval", options.run_folder], ["evit", "export", options.run_folder, "--format", "onnx"])


def _pictures(options: argparse.Namespace) -> tuple[list[Any], str]:
    from evit_ext.report.pictures import kept_patches
    from evit_ext.training.loaders import Loaders
    from evit_ext.training.ranks import Ranks
    from evit_ext.visualize.photos import Eye

    options.checkpoint, options.ema = None, None
    name_model(options, options.run_folder)
    config = replace(configuration(options), workers=0)
    names = class_names(options, config)
    device = chosen_device(options)
    loaders = Loaders(config, Ranks(device=device), min(options.images, 64), training=False, classes=names)
    model: Any = build(config, options, names)
    weights = load_weights(model, options).words
    loaders.image = _image(model, config)
    batch = loaders.some_val(options.images)
    model = model.to(device).eval()
    eye = Eye(loaders.image)
    return kept_patches(model, batch.images.to(device), batch.labels.tolist(), loaders.classes, eye), weights


def _image(model: nn.Module, config: TrainConfig) -> dict[str, Any]:
    embed: Any = model.patch_embed
    settings = timm.data.resolve_model_data_config(model, {"img_size": embed.img_size[0]})
    return {**settings, **preparation(config)}
