"""Recipes: the published numbers, and numbers that cannot be meant."""

from __future__ import annotations

from typing import Any

import pytest

from evit_ext.training import Recipe, load_config

FROM_SCRATCH = load_config("imagenet-300")
FINE_TUNE = load_config("imagenet-finetune-30")


def test_published_recipes() -> None:
    assert (FROM_SCRATCH.epochs, FROM_SCRATCH.batch_size, FROM_SCRATCH.lr) == (300, 2048, 2e-3)
    assert (FROM_SCRATCH.keep_rate_start_epoch, FROM_SCRATCH.keep_rate_end_epoch) == (10, 110)
    assert (FINE_TUNE.epochs, FINE_TUNE.lr, FINE_TUNE.min_lr) == (30, 2e-5, 2e-6)
    assert FINE_TUNE.weight_decay == 1e-6
    assert FINE_TUNE.eval_mode
    assert FINE_TUNE.warmup_epochs == FINE_TUNE.keep_rate_end_epoch == 0


def test_learning_rate_follows_the_batch_size() -> None:
    small = FROM_SCRATCH.for_batch_size(512)
    assert small.batch_size == 512
    assert small.lr == pytest.approx(5e-4)
    assert small.min_lr == pytest.approx(FROM_SCRATCH.min_lr / 4)
    assert small.warmup_lr == pytest.approx(FROM_SCRATCH.warmup_lr / 4)
    assert small.weight_decay == FROM_SCRATCH.weight_decay


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"batch_size": -1}, "batch_size must be at least 1"),
        ({"lr": -1e-3}, "lr must not be negative"),
        ({"lr": float("nan")}, "lr must not be negative, got nan"),
        ({"label_smoothing": 1.0}, r"label_smoothing must be in \[0, 1\)"),
        ({"epochs": 3, "warmup_epochs": 3}, "warmup_epochs 3 must be less than epochs 3"),
        ({"ema_decay": 1.0}, r"ema_decay must be in \(0, 1\)"),
        ({"keep_rate": 0.0}, r"keep_rate must be in \(0, 1\], got 0.0"),
        ({"keep_rate_start_epoch": 5, "keep_rate_end_epoch": 4}, "keep_rate_start_epoch <= keep_rate_end"),
        (
            {"epochs": 20, "keep_rate": 0.7, "keep_rate_end_epoch": 110},
            "keep_rate_end_epoch 110 must be at most epochs 20: the keep rate would not reach 0.7",
        ),
        ({"clip_grad": 0.0}, "clip_grad must be positive"),
    ],
)
def test_bad_numbers(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recipe(**change)


def test_drop_path_without_effect_is_refused() -> None:
    with pytest.raises(ValueError, match=r"eval_mode trains without drop path: .* got 0\.1"):
        load_config("imagenet-finetune-30", drop_path=0.1)
