"""Training on a GPU: the same losses as on the CPU, in every precision; whole runs, killed by no kernel."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import evit_ext
from evit_ext.cli import main
from evit_ext.training import Precision, Recipe, Trainer

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="CUDA: torch.cuda.is_available() is False"
)

STEPS = 4
RECIPE = Recipe(
    epochs=2,
    batch_size=16,
    lr=3e-3,
    warmup_epochs=0.5,
    mixup=0.3,
    cutmix=1.0,
    clip_grad=1.0,
    ema_decay=0.9,
    keep_rate=0.6,
    keep_rate_end_epoch=1,
)


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(STEPS * 16) % 5
    images = torch.randn(STEPS * 16, 3, 32, 32, generator=generator) * 0.3 + (
        labels[:, None, None, None] - 2.0
    )
    # Two micro-batches a step.
    return list(zip(images.split(8), labels.split(8), strict=True))


def losses(small_vit: Any, device: str, dtype: torch.dtype) -> tuple[list[float], Trainer]:
    torch.manual_seed(0)
    model = evit_ext.apply(small_vit(), 0.6).to(device)
    trainer = Trainer(model, RECIPE, STEPS, precision=Precision(dtype, "test"), accumulation=2)
    seen: list[float] = []
    for _ in range(RECIPE.epochs):
        after = lambda: seen.append(trainer.last.loss.item())  # type: ignore[union-attr]  # noqa: E731
        trainer.train_one_epoch(batches(), progress=False, after_step=after)
    return seen, trainer


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 0.05), (torch.float16, 0.02)]
)
def test_the_same_losses_as_on_the_cpu(small_vit: Any, dtype: torch.dtype, tolerance: float) -> None:
    """Without drop path, whose random numbers are the device's own."""
    expected, _ = losses(small_vit, "cpu", torch.float32)
    actual, trainer = losses(small_vit, "cuda", dtype)
    assert actual == pytest.approx(expected, rel=tolerance)
    assert all(value.is_cuda for value in trainer.ema.module.state_dict().values())  # type: ignore[union-attr]


def test_again_with_the_same_bits(small_vit: Any, tmp_path: Path) -> None:
    torch.use_deterministic_algorithms(True)
    try:
        first, _ = losses(small_vit, "cuda", torch.float32)
        second, _ = losses(small_vit, "cuda", torch.float32)
    finally:
        torch.use_deterministic_algorithms(False)
    assert first == second


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_a_run_that_goes_on(tmp_path: Path, precision: str, capsys: pytest.CaptureFixture[str]) -> None:
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        for number, name in enumerate(("dark", "bright")):
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            for image in range(24):
                pixels = generator.integers(0, 128, (40, 40, 3)) + 120 * number
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{image}.png")
    options = [
        *("--data", str(tmp_path / "data"), "--output", str(tmp_path / "run"), "--device", "cuda"),
        *("--model", "vit_tiny_patch16_224", "--img-size", "32", "--epochs", "4", "--batch-size", "16"),
        *("--model-args", "patch_size=8", "embed_dim=48", "depth=4", "num_heads=3"),
        *("--lr", "1e-3", "--warmup-epochs", "1", "--keep-rate", "0.6", "--ema-decay", "0.9"),
        *("--drop-path", "0.1", "--precision", precision, "--workers", "2", "--log-every", "1"),
    ]
    assert main(["train", *options]) == 0
    (tmp_path / "run" / "checkpoints" / "checkpoint-000000012.pth").unlink()
    assert main(["train", *options]) == 0
    assert "goes on from" in capsys.readouterr().out
    with (tmp_path / "run" / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["kind"] == "train"]
    assert [int(row["step"]) for row in rows] == list(range(1, 13))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["last"]["top1"] > 90
