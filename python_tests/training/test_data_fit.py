"""Settings that fit the data's size."""

from __future__ import annotations

import math

import pytest

from evit_ext.training import data_fit
from evit_ext.training.config import load_config
from evit_ext.training.data_fit import FITTED, RECIPE, fit_to_data


@pytest.mark.parametrize(
    ("images", "batch", "epochs"), [(1, 1, 30), (7, 1, 30), (160, 16, 30), (500, 32, 10), (10**6, 64, 10)]
)
def test_sizes(images: int, batch: int, epochs: int) -> None:
    config = fit_to_data(load_config(RECIPE), (), images, pretrained=True)
    assert (config.batch_size, config.epochs, config.warmup_epochs) == (batch, epochs, epochs / 10)
    assert config.lr == pytest.approx(1e-4 * math.sqrt(batch / 64), rel=0.05)
    assert config.min_lr < config.lr and 1 <= config.log_every <= 50 and config.pretrained
    # Larger, because there is more to learn from random weights.
    assert fit_to_data(load_config(RECIPE), (), images, pretrained=False).lr > 4 * config.lr


def test_what_is_given_stays() -> None:
    given = {"batch_size": 64, "lr": 0.5, "epochs": 3, "workers": 7, "warmup_epochs": 1.0}
    config = fit_to_data(load_config(RECIPE, **given), given, 160, pretrained=False)
    assert {name: getattr(config, name) for name in given} == given and config.min_lr == 0.005
    # A batch size of one's own has the learning rate that goes with it.
    config = fit_to_data(load_config(RECIPE, batch_size=64), ("batch_size",), 160, pretrained=True)
    assert config.lr == 1e-4
    assert set(FITTED) <= set(vars(config))


def test_processes_and_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fit_to_data(load_config(RECIPE), (), 160, True, world_size=3).batch_size == 15
    assert fit_to_data(load_config(RECIPE), (), 10, True, world_size=8).batch_size == 8
    monkeypatch.setattr(data_fit, "shared_memory_free", lambda: 64 * 2**20)
    monkeypatch.setattr(data_fit.os, "cpu_count", lambda: 8)
    assert fit_to_data(load_config(RECIPE), (), 10_000, True).workers == 0
    assert fit_to_data(load_config(RECIPE), (), 60, True).workers == 4
