"""benchmarks/onnx_runtime.py: what its rows compare."""

from __future__ import annotations

import importlib
import time
from pathlib import Path
from typing import Any

import pytest

from evit_ext.benchmark import Here

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
if not BENCHMARKS.exists():
    pytest.skip("tests run without the source tree", allow_module_level=True)


def test_speed_up_is_over_the_dense_model_of_the_same_runtime(
    onnx: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    measure = importlib.import_module("onnx_runtime").measure

    def takes(milliseconds: float) -> Here:
        return Here(lambda: time.sleep(milliseconds / 1e3))

    runs = {
        "dense|ONNX Runtime": takes(40),
        "dense|PyTorch": takes(20),
        "EViT 0.7|ONNX Runtime": takes(10),
        "EViT 0.7|PyTorch": takes(10),
    }
    rows = measure(runs, 2, {"dense": 2.0, "EViT 0.7": None}, seconds=0.0)
    assert [f"{row['model']}|{row['runtime']}" for row in rows] == list(runs)
    # With room for a machine that has other things to do.
    assert 1 == rows[0]["speed-up"] == rows[1]["speed-up"] and rows[0]["GMACs"] == 2.0
    assert rows[2]["speed-up"] > 2.5 > rows[3]["speed-up"] > 1.2 and rows[2]["GMACs"] is None
    assert 25 < rows[0]["images/s"] <= 50
