"""benchmarks/training_steps.py: what it measures, on the smallest model, and its table."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
if not BENCHMARKS.exists():
    pytest.skip("tests run without the source tree", allow_module_level=True)
sys.path.insert(0, str(BENCHMARKS))

import training_steps as training  # noqa: E402


def test_processes_are_measured() -> None:
    setups = (
        training.Setup(keep_rate=0.5, batch=2, img_size=32),
        training.Setup(keep_rate=1.0, batch=2, img_size=32, processes=2),
    )
    alone, two = training.measure("deit_tiny", setups, rounds=2)
    assert alone["gradients_seconds"] is None and two["gradients_seconds"] < two["step_seconds"]
    assert two["images_per_second"] == 4 / two["step_seconds"]
    # Weights, gradients and AdamW's two averages.
    assert alone["peak_mib"] - alone["before_mib"] > 3 * alone["gradient_mib"]
    assert alone["gmacs"] < two["gmacs"]
    first, _, *lines = training.table([alone, two]).splitlines()
    assert [line.count("|") for line in lines] == [first.count("|")] * 2
    assert lines[0].startswith("| 1 | 0.5 | 2 | 32 |") and "| – |" in lines[0]


def test_a_step_trains(one_thread: None) -> None:
    step = training.Step("deit_tiny", training.Setup(batch=2, img_size=32))
    before = [parameter.detach().clone() for parameter in step.model.parameters()]
    assert step.run(together=True) > 0
    changed = [not torch.equal(old, new) for old, new in zip(before, step.model.parameters(), strict=True)]
    assert all(changed[-2:]) and sum(changed) > len(changed) / 2
