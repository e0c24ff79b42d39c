"""``evit eval``: how good a trained model is, and how fast, at one keep rate or several."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import timm.data
import torch
from torch import nn

from evit_ext._util.files import replacing
from evit_ext._util.tables import aligned
from evit_ext.cli.engines import chosen_engine, set_files_keep_rate
from evit_ext.cli.options import overrides
from evit_ext.cli.output import check_writable, say_next, words_for, words_for_visualize
from evit_ext.cli.runs import run_config
from evit_ext.cli.trained import check_classes, class_names, configuration, load_weights, name_model
from evit_ext.cost.macs import count_macs
from evit_ext.data.classes import weights_class_names
from evit_ext.models.by_name import create_dense
from evit_ext.patching.keep_rates import keep_rates, set_keep_rate
from evit_ext.training.config import TrainConfig
from evit_ext.training.evaluation import Evaluation, evaluate
from evit_ext.training.precision import Precision
from evit_ext.training.ranks import Ranks, join
from evit_ext.training.throughput import measure_throughput


@dataclass(frozen=True)
class _Row:
    """Results at one keep rate; `alone` is the model's images per second without loading data."""

    keep_rate: list[float]
    gmacs: float
    alone: float | None
    found: Evaluation
    classes: int

    def cells(self) -> list[str]:
        found = self.found
        return [
            " ".join(f"{rate:g}" for rate in self.keep_rate) or "–",
            f"{found.top1:.2f}",
            # Of five classes or fewer, every image is right among five.
            f"{found.top5:.2f}" if self.classes > 5 else "–",
            f"{found.loss:.4f}",
            f"{found.images}",
            f"{found.images_per_second:.0f}",
            "–" if self.alone is None else f"{self.alone:.0f}",
            f"{self.gmacs:.4g}",
            f"{100 * found.tokens_kept:.1f}",
        ]

    def plain(self) -> dict[str, Any]:
        values = asdict(self.found)
        del values["unreadable"]
        return {
            "keep_rate": self.keep_rate,
            "gmacs": self.gmacs,
            "model_images_per_second": self.alone,
            **values,
        }


_HEADINGS = (
    "keep rate", "top-1 %", "top-5 %", "loss", "images", "images/s", "without data", "GMACs", "tokens left %",
)  # fmt: skip


def run(options: argparse.Namespace) -> None:
    if options.at_once < 1 or options.repeats < 0:
        raise ValueError(
            f"expected --batch-size of at least 1 and --repeats of at least 0, got {options.at_once} and "
            f"{options.repeats}"
        )
    if options.output is not None:
        check_writable(options.output)
    name_model(options, options.named)
    engine = chosen_engine(options)
    config = engine.configured(_whole(configuration(options), options))
    with join(options.device) as ranks:
        model, loaders = _prepare(config, ranks, options)
        loaders.image = engine.prepared(loaders.image)
        source = load_weights(model, options).words
        set_files_keep_rate(model, engine)
        model.to(ranks.device)
        name, why, precision = engine.precision(ranks.device, config.precision)
        shape = (options.at_once, *loaders.image["input_size"])
        rows = []
        for rate in options.keep_rates or [None]:
            if rate is not None:
                set_keep_rate(model, rate)
            gmacs = count_macs(model, tuple(shape[2:])) / 1e9
            with engine.running(model, name) as served:
                images, progress = loaders.val(), options.progress and not options.json
                found = evaluate(served, images, precision, ranks, progress, loaders.val_batches)
                alone = _speed(served, shape, options.repeats, precision, ranks)
            rows.append(_Row(keep_rates(model), gmacs, alone, found, loaders.num_classes))
    if ranks.is_first:
        facts = {
            "model": config.model,
            "weights": source,
            "engine": engine.name if engine.file is None else f"{engine.name}, {engine.file}",
            "precision": f"{name} ({why})",
            "device": ranks.device.type,
            "processes": ranks.world_size,
        }
        _print(facts, rows, loaders.words, options)


def _whole(config: TrainConfig, options: argparse.Namespace) -> TrainConfig:
    """Return the configuration; of data not the run's own, a folder without splits is evaluated whole."""
    given = overrides(options)
    of_run = options.run_folder is not None and "data" not in given
    if of_run or "val_fraction" in given:
        return config
    if options.run_folder is not None:
        own = run_config(options.run_folder, {}).data
        if own is not None and config.data is not None and Path(own).resolve() == Path(config.data).resolve():
            return config
    return replace(config, val_fraction=1.0)


def _prepare(config: TrainConfig, ranks: Ranks, options: argparse.Namespace) -> tuple[nn.Module, Any]:
    """Return the model, built for the data's classes, and the validation data, prepared for the model."""
    # Imported here, because it takes a while.
    from evit_ext.training.building import build_model
    from evit_ext.training.loaders import Loaders

    names = class_names(options, config)
    of_model = options.run_folder or config.model
    loaders = Loaders(config, ranks, options.at_once, training=False, classes=names, of_model=of_model)
    if names is None:
        _match_without_names(loaders, config)
    model: Any = build_model(config, loaders.num_classes)
    check_classes(config, model)
    size = model.patch_embed.img_size
    loaders.image = timm.data.resolve_model_data_config(model, {"img_size": size[0]} if size else {})
    return model, loaders


def _match_without_names(loaders: Any, config: TrainConfig) -> None:
    """Match the data's classes to a model that does not name its own: as ImageNet's, or in order."""
    if not loaders.classes:
        return  # labels are numbers
    probe: Any = None
    if config.num_classes is None and config.pretrained:
        with torch.device("meta"):
            dense: Any = create_dense(config.model, **config.model_args)
        probe = dense.pretrained_cfg.get("num_classes")
    known = weights_class_names(config.num_classes or probe or len(loaders.classes), loaders.classes)
    if known is not None:
        loaders.know_classes(known, config.model)
    elif loaders.named_classes < loaders.num_classes:
        raise ValueError(
            f"the data has {loaders.named_classes} classes and the model {loaders.num_classes}, whose names "
            "are not known: give them, in the order of its logits, with --classes FILE"
        )
    else:
        loaders.words.append(
            "the weights do not name their classes: matched by the order of the data's names"
        )


def _speed(
    model: nn.Module, shape: tuple[int, ...], repeats: int, precision: Precision, ranks: Ranks
) -> float | None:
    """Return the images per second of the first process while the others wait; None in the others."""
    speed = None
    if ranks.is_first and repeats:
        images = torch.randn(shape, device=ranks.device)
        speed = measure_throughput({"model": model}, images, repeats, precision)["model"]
    ranks.barrier()
    return speed


def _print(facts: dict[str, Any], rows: list[_Row], words: list[str], options: argparse.Namespace) -> None:
    unreadable = rows[0].found.unreadable
    listed = [{"path": path, "reason": reason} for path, reason in unreadable]
    everything = {**facts, "notes": words, "rows": [row.plain() for row in rows], "unreadable": listed}
    if options.output is not None:
        with replacing(options.output) as file:
            file.write(json.dumps(everything, indent=2) + "\n")
    if options.json:
        print(json.dumps(everything, indent=2))
        return
    print("\n".join([*(f"{name}: {fact}" for name, fact in facts.items()), *words]))
    print(f"\n{aligned([_HEADINGS, *(row.cells() for row in rows)])}")
    if unreadable:
        print(f"\nimages that could not be read and were left out: {len(unreadable)}")
        print("\n".join(f"  {path}: {reason}" for path, reason in unreadable))
    model = facts["model"]
    page = f"{Path(options.run_folder or model).name}.html"
    say_next(
        ["evit", "visualize", "PHOTO", *words_for_visualize(options, model), "--html", page],
        ["evit", "export", *words_for(options, model), "--format", "onnx"],
    )
