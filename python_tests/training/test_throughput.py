"""Throughput: the median of turns taken."""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor, nn

from evit_ext.training import Precision, measure_throughput
from evit_ext.training import throughput as module

FLOAT32 = Precision(torch.float32, "test")


class Sleeper(nn.Module):
    def __init__(self, name: str, log: list[str]) -> None:
        super().__init__()
        self.name, self.log = name, log

    def forward(self, images: Tensor) -> Tensor:
        assert not self.training
        assert torch.is_inference_mode_enabled()
        self.log.append(self.name)
        return images


def test_models_take_turns_and_medians_count(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    # Seconds on the clock at start and end of each forward: the warm-up, then three turns of a and b.
    durations = [50.0, 60.0, 1.0, 2.0, 90.0, 4.0, 2.0, 90.0]
    clock = iter([value for duration in durations for value in (0.0, duration)])
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(clock))
    models = {name: Sleeper(name, log).train() for name in "ab"}
    result = measure_throughput(models, torch.zeros(8, 1), repeats=3, precision=FLOAT32)
    assert log == list("abababab")
    assert result == {"a": 8 / 2.0, "b": 8 / 4.0}
    assert all(model.training for model in models.values())


def test_real_time() -> None:
    class Slow(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            time.sleep(0.02)
            return images

    result = measure_throughput({"slow": Slow()}, torch.zeros(4, 1), repeats=3, precision=FLOAT32)
    # sleep() never returns early; a busy machine may let it return late.
    assert 20 < result["slow"] <= 4 / 0.02


@pytest.mark.parametrize(("models", "images", "repeats"), [(0, 1, 1), (1, 0, 1), (1, 1, 0)])
def test_nothing_to_measure(models: int, images: int, repeats: int) -> None:
    with pytest.raises(ValueError, match="nothing to measure"):
        measure_throughput(
            {str(i): nn.Identity() for i in range(models)}, torch.zeros(images, 1), repeats, FLOAT32
        )
