"""The demo, step by step: train a DeiT, fine-tune EViTs from it, measure all of them, draw what they keep."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from evit_ext._util.files import replacing
from evit_ext._util.safetensors_bytes import to_bytes
from evit_ext.cost.macs import count_macs
from evit_ext.data import CanvasBatch, ClutteredDigits, denormalize, object_patches
from evit_ext.demo.network import build_deit
from evit_ext.demo.settings import Settings
from evit_ext.demo.survival import measure_survival, recorded
from evit_ext.demo.table import format_table
from evit_ext.demo.tokens_picture import Column, save_tokens_picture
from evit_ext.patching.applying import apply
from evit_ext.training import (
    Precision,
    Recipe,
    Trainer,
    choose_precision,
    evaluate,
    measure_throughput,
)
from evit_ext.visualize.views import surviving_patches

_TEST_BATCH = 250
# The test canvases do not follow the seed of the training: runs with different seeds see the same ones.
_TEST_SEED = 1797


@dataclass
class Demo:
    """One run of the demo.

    Args:
        settings: see :class:`Settings`.
        output: folder for the results; made if it is not there.
        seed: of weights and training data.
        precision: "auto", "float32" or "bfloat16".
        progress: show progress.

    Raises:
        ModuleNotFoundError: an optional package is not installed.
        ValueError: a bad setting.
        OSError: the folder cannot be written.
    """

    settings: Settings
    output: Path
    seed: int = 0
    precision: str = "auto"
    progress: bool = True
    _precision: Precision = field(init=False)
    _train: ClutteredDigits = field(init=False)
    _test: ClutteredDigits = field(init=False)

    def __post_init__(self) -> None:
        # What would only fail after minutes of training fails now.
        for package in ("sklearn", "matplotlib"):
            if find_spec(package) is None:
                name = {"sklearn": "scikit-learn"}.get(package, package)
                raise ModuleNotFoundError(f'the demo needs {name}: pip install "evit_ext[demo]"')
        s = self.settings
        self._precision = choose_precision("cpu", self.precision)
        self._train = ClutteredDigits("train", s.canvas_size, s.train_images, self.seed, 0, s.difficulty)
        self._test = ClutteredDigits("test", s.canvas_size, s.test_images, _TEST_SEED, 0, s.difficulty)
        self.output.mkdir(parents=True, exist_ok=True)

    def run(self) -> list[dict[str, Any]]:
        """Do everything; returns the rows of metrics.json."""
        s = self.settings
        start = time.perf_counter()
        torch.manual_seed(self.seed)
        dense = build_deit(s.canvas_size, s.patch_size, s.embed_dim, s.depth, s.num_heads)
        grid = s.canvas_size // s.patch_size
        print(
            f"cluttered digits ({s.difficulty}): {s.canvas_size}x{s.canvas_size} pixels, "
            f"{grid * grid} patches; train and test from disjoint scans\n"
            f"DeiT: {s.depth} blocks, {s.embed_dim} channels, {s.num_heads} heads\n"
            f"precision: {self._precision}; {torch.get_num_threads()} threads"
        )
        self._fit("DeiT", dense, s.dense, first_epoch=0)
        models: dict[str, nn.Module] = {"DeiT": dense}
        rows = [self._row("DeiT", dense, 1.0)]
        first_epoch = s.dense.epochs
        for keep_rate in s.keep_rates:
            name = f"EViT/{keep_rate:g}"
            evit = apply(copy.deepcopy(dense), keep_rate=keep_rate)
            before = evaluate(evit, self._test.batches(_TEST_BATCH), self._precision).top1
            print(f"{name}: {before:.1f} % before fine-tuning")
            self._fit(name, evit, s.fine_tune, first_epoch)
            models[name] = evit
            rows.append({**self._row("EViT", evit, keep_rate), "top1_before_fine_tuning": round(before, 3)})
        images = self._test.render(range(s.throughput_batch)).images
        throughput = measure_throughput(models, images, s.throughput_repeats, self._precision)
        for row, images_per_second in zip(rows, throughput.values(), strict=True):
            row["images_per_second"] = round(images_per_second, 1)
            row["speedup"] = round(images_per_second / throughput["DeiT"], 3)
        self._save(models, rows)
        print(f"\n{format_table(rows)}\n")
        print("kept at stage: share of the digit's patches that are left, network / random selection")
        print(
            f"{self.output}/: metrics.json, tokens.png, checkpoints   ({time.perf_counter() - start:.0f} s)"
        )
        return rows

    def _fit(self, name: str, model: nn.Module, recipe: Recipe, first_epoch: int) -> None:
        steps = self.settings.train_images // recipe.batch_size
        trainer = Trainer(model, recipe, steps, precision=self._precision)
        for epoch in range(recipe.epochs):
            self._train.set_epoch(first_epoch + epoch)
            batches = self._train.batches(recipe.batch_size, shuffle=True, drop_last=True)
            trainer.train_one_epoch(batches, f"{name} epoch {epoch + 1}/{recipe.epochs}", self.progress)

    def _row(self, name: str, model: nn.Module, keep_rate: float) -> dict[str, Any]:
        """A row of metrics.json; throughput is added when all models are there to take turns."""
        result = evaluate(model, self._test.batches(_TEST_BATCH), self._precision)
        print(f"{name} at keep rate {keep_rate:g}: {result.top1:.1f} % of {result.images} test images")
        batches = self._test.batches(_TEST_BATCH)
        kept, at_random = (
            measure_survival(model, batches, self.settings.patch_size, self._precision)
            if keep_rate < 1
            else ([], [])
        )
        return {
            "model": name,
            "keep_rate": keep_rate,
            "top1": round(result.top1, 3),
            "gmacs": count_macs(model) / 1e9,
            "object_patches_kept": [round(share, 4) for share in kept],
            "object_patches_kept_at_random": [round(share, 4) for share in at_random],
        }

    def _save(self, models: dict[str, nn.Module], rows: list[dict[str, Any]]) -> None:
        s = self.settings
        with replacing(self.output / "metrics.json") as file:
            file.write(json.dumps(rows, indent=2) + "\n")
        shape = {
            name: str(getattr(s, name))
            for name in ("canvas_size", "patch_size", "embed_dim", "depth", "num_heads")
        }
        for name, model in models.items():
            path = self.output / f"{name.lower().replace('/', '_')}.safetensors"
            tensors = {key: value.contiguous() for key, value in model.state_dict().items()}
            with replacing(path, "wb") as file:
                file.write(to_bytes(tensors, shape))
        batch = self._test.render(_pictured(self._test, s.pictured))
        self._picture(models, rows, batch)

    def _picture(self, models: dict[str, nn.Module], rows: list[dict[str, Any]], batch: CanvasBatch) -> None:
        columns = []
        num_patches = (self.settings.canvas_size // self.settings.patch_size) ** 2
        for row in rows[1:]:
            keep_rate = row["keep_rate"]
            predicted, kept, _ = recorded(models[f"EViT/{keep_rate:g}"], batch.images, self._precision)
            survivors = surviving_patches(kept, num_patches)
            title = f"EViT, keep rate {keep_rate:g}"
            columns.append(Column(title, survivors, row["object_patches_kept"], predicted))
        save_tokens_picture(
            self.output / "tokens.png",
            denormalize(batch.images),
            batch.labels,
            object_patches(batch.masks, self.settings.patch_size),
            columns,
        )


def _pictured(test: ClutteredDigits, count: int) -> list[int]:
    """The first `count` items that differ in their label as long as there are new ones: nothing is picked."""
    return list(_by_label(test))[:count]


def _by_label(test: ClutteredDigits) -> Iterator[int]:
    seen: dict[int, list[int]] = {}
    labels = test.labels
    for index in range(len(test)):
        seen.setdefault(int(labels[index % len(labels)]), []).append(index)
    for round_ in range(max(map(len, seen.values()))):
        for label in sorted(seen):
            if round_ < len(seen[label]):
                yield seen[label][round_]
