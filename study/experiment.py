"""One run of a study: build the network, train it, test it."""

from __future__ import annotations

import json
import platform
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from evit_ext import models
from evit_ext._util.files import replacing
from evit_ext._util.modes import eval_mode
from evit_ext._util.randomness import derive_seed, seeded
from evit_ext._util.safetensors_bytes import to_bytes
from evit_ext.cost.macs import count_macs
from evit_ext.data import ClutteredDigits
from evit_ext.demo.network import build_deit
from evit_ext.demo.survival import measure_survival
from evit_ext.patching.applying import apply
from evit_ext.patching.oracle import Oracle
from evit_ext.tokens.rule import rules_by_name
from evit_ext.training import (
    Classification,
    DynamicViTLoss,
    DynamicViTTraining,
    Guided,
    Objective,
    Precision,
    Trainer,
    build_criterion,
    choose_precision,
    evaluate,
)
from evit_ext.training.shared_memory import check_shared_memory
from study.plan import Arm, Plan

_TEST_BATCH = 250
# Streams of random numbers of a seed.
_WEIGHTS, _IMAGES, _STEPS, _TEST = range(4)


class Experiment:
    """A run: an arm with a seed.

    Args:
        plan: see :class:`study.plan.Plan`.
        name: of the arm.
        seed: from 0.
        weights: folder with the weights of runs, which others start from.
        device: where it trains.
        precision: as of ``evit train``.
        workers: processes that draw the images; 0 draws them in this one.
    """

    def __init__(
        self,
        plan: Plan,
        name: str,
        seed: int,
        weights: Path,
        device: str = "cpu",
        precision: str = "float32",
        workers: int = 0,
    ) -> None:
        self._plan, self._name, self._seed, self._weights = plan, name, seed, weights
        self._arm: Arm = plan.arms[name]
        self._device = torch.device(device)
        self._precision: Precision = choose_precision(self._device, precision)
        self._workers = workers
        self._canvas_size = self._arm.canvas_size or plan.task.canvas_size

    def run(self) -> dict[str, Any]:
        """Train and test; write the weights; return the result, values for JSON."""
        start = time.perf_counter()
        model = self.build().to(self._device)
        losses = self._train(model) if self._arm.recipe is not None else []
        result = {
            "study": self._plan.name,
            "arm": self._name,
            "seed": self._seed,
            "settings": self._plan.settings(self._name),
            "machine": {
                "processor": processor_name(self._device),
                "torch": torch.__version__,
                "precision": str(self._precision),
            },
            **self._test(model),
            "losses": losses,
            "seconds": round(time.perf_counter() - start, 1),
        }
        self._save(model)
        return result

    def build(self, trained: bool = True) -> nn.Module:
        """Return the network before training: from scratch, or with the weights that the arm starts from.

        If not `trained`, these are left out.
        """
        arm, network, task = self._arm, self._plan.network, self._plan.task
        with seeded(derive_seed(self._seed, _WEIGHTS)):
            dense = build_deit(
                canvas_size=self._canvas_size,
                patch_size=task.patch_size,
                embed_dim=network.embed_dim,
                depth=network.depth,
                num_heads=network.num_heads,
            )
            if trained and arm.start is not None:
                dense.load_state_dict(self._trained(arm.start))
            if arm.model == "dynamicvit":
                return self._as_dynamicvit(dense)
        if not arm.reduces:
            return dense
        rule = rules_by_name(arm.rule, arm.keep_rate, arm.rule_args)
        return apply(dense, drop_loc=arm.drop_loc, rule=rule)

    def _as_dynamicvit(self, dense: nn.Module) -> nn.Module:
        network = self._plan.network
        model = models.dynamicvit_tiny(
            keep_rate=0.7 if self._arm.keep_rate is None else self._arm.keep_rate,
            drop_loc=self._arm.drop_loc,
            img_size=self._canvas_size,
            num_classes=ClutteredDigits.num_classes,
            patch_size=self._plan.task.patch_size,
            embed_dim=network.embed_dim,
            depth=network.depth,
            num_heads=network.num_heads,
        )
        missing = model.load_state_dict(dense.state_dict(), strict=False)
        assert not missing.unexpected_keys
        return model

    def _trained(self, name: str) -> dict[str, torch.Tensor]:
        path = weights_file(self._weights, name, self._seed)
        if not has_weights(self._weights, self._plan, name, self._seed):
            raise FileNotFoundError(
                f"{path} is missing, or is of a run with other settings than the plan's: run {name} with "
                f"seed {self._seed} first"
            )
        return load_file(path)

    def _data(self, split: str, easy: bool = False) -> ClutteredDigits:
        task = self._plan.task
        if split == "train":
            size, seed = task.train_images, derive_seed(self._seed, _IMAGES)
        else:
            size, seed = task.test_images, task.test_seed
        return ClutteredDigits(split, self._canvas_size, size, seed, 0, task.make_difficulty(easy))

    def _objective(self, model: nn.Module) -> Objective:
        assert self._arm.recipe is not None
        criterion = build_criterion(self._plan.recipes[self._arm.recipe])
        if self._arm.model == "dynamicvit":
            teacher = None
            if self._arm.start is not None:
                teacher = self._dense(self._arm.start)
            return DynamicViTTraining(DynamicViTLoss(model.keep_ratios, teacher, criterion))  # type: ignore[arg-type]
        if self._arm.oracle is not None:
            return Guided(
                Classification(criterion), Oracle(self._dense(self._arm.oracle), self._arm.drop_loc)
            )
        return Classification(criterion)

    def _dense(self, name: str) -> nn.Module:
        """Return the trained dense network of an arm, on the device."""
        experiment = Experiment(self._plan, name, self._seed, self._weights, str(self._device))
        model = experiment.build()
        model.load_state_dict(self._trained(name))
        return model.to(self._device).eval()

    def _train(self, model: nn.Module) -> list[float]:
        """Return the mean loss of each epoch."""
        assert self._arm.recipe is not None
        recipe = self._plan.recipes[self._arm.recipe]
        easy_epochs = self._plan.task.easy_epochs if self._arm.start is None else 0
        if self._arm.keep_rate is not None and recipe.keep_rate_end_epoch > 0:
            recipe = replace(recipe, keep_rate=self._arm.keep_rate)
        trainer = Trainer(
            model,
            recipe,
            self._plan.task.train_images // recipe.batch_size,
            ClutteredDigits.num_classes,
            self._precision,
            self._objective(model),
            seed=derive_seed(self._seed, _STEPS),
        )
        self._check_shared_memory(recipe.batch_size)
        losses = []
        for epoch in range(recipe.epochs):
            data = self._data("train", easy=epoch < easy_epochs)
            data.set_epoch(epoch)
            batches = data.batches(recipe.batch_size, shuffle=True, drop_last=True, workers=self._workers)
            losses.append(round(trainer.train_one_epoch(batches, progress=False).loss, 5))
        return losses

    def _test(self, model: nn.Module) -> dict[str, Any]:
        data, patch_size = self._data("test"), self._plan.task.patch_size
        self._check_shared_memory(_TEST_BATCH)
        with seeded(derive_seed(self._seed, _TEST), self._device):
            found = evaluate(model, data.batches(_TEST_BATCH, workers=self._workers), self._precision)
        with eval_mode(model):  # a DynamicViT drops tokens in it alone
            gmacs = count_macs(model) / 1e9
        result: dict[str, Any] = {
            "top1": round(found.top1, 3),
            "loss": round(found.loss, 5),
            "test_images": found.images,
            "gmacs": gmacs,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
        }
        if self._arm.reduces and self._arm.rule != "tome":  # which keeps a part of every patch
            batches = data.batches(_TEST_BATCH, workers=self._workers)
            kept, at_random = measure_survival(model, batches, patch_size, self._precision)
            result["object_patches_kept"] = [round(share, 4) for share in kept]
            result["object_patches_kept_at_random"] = [round(share, 4) for share in at_random]
        return result

    def _check_shared_memory(self, batch_size: int) -> None:
        """Raise ValueError where the workers' batches would not fit: images of float32, and masks."""
        batch_bytes = batch_size * self._canvas_size**2 * (3 * 4 + 1)
        check_shared_memory(self._workers, batch_bytes, "use fewer --workers")

    def _save(self, model: nn.Module) -> None:
        path = weights_file(self._weights, self._name, self._seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
        with replacing(path, "wb") as file:
            file.write(to_bytes(tensors, {"settings": _settings_of(self._plan, self._name)}))


def weights_file(folder: Path, name: str, seed: int) -> Path:
    """Return where the weights of a run are."""
    return folder / f"{name}.{seed}.safetensors"


def has_weights(folder: Path, plan: Plan, name: str, seed: int) -> bool:
    """Return whether the weights of a run are there, and of a run with the plan's settings."""
    path = weights_file(folder, name, seed)
    if not path.exists():
        return False
    with safe_open(path, "pt") as file:
        return (file.metadata() or {}).get("settings") == _settings_of(plan, name)


def _settings_of(plan: Plan, name: str) -> str:
    return json.dumps(plan.settings(name), sort_keys=True)


def processor_name(device: torch.device) -> str:
    """Return the name of the processor, or of the GPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
