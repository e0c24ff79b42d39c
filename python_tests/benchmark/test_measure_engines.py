"""Models side by side in engines."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from evit_ext.benchmark import Contestant, contestants, engine_files, measure_engines

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 10}

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnxscript", "onnxruntime", "openvino")),
    reason="onnxscript, onnxruntime or openvino is not installed: pip install 'evit_ext[openvino]'",
)


@pytest.fixture
def models(one_thread: None) -> list[Contestant]:
    torch.manual_seed(0)
    return contestants("vit_tiny_patch16_224", (0.6,), reduction={"drop_loc": (0,)}, **TINY)


def test_rows(models: list[Contestant]) -> None:
    images = torch.randn(4, 3, 32, 32)
    with engine_files(models, images, ("float32", "int8")) as files:
        paths = list(files.values())
        assert set(files) == {(model.name, is_int8) for model in models for is_int8 in (False, True)}
        engines = ("torch", "onnxruntime", "openvino")
        cases = [(model, engine) for engine in engines for model in models]
        rows = measure_engines(cases, images[:2], "float32", files, seconds=0.05)
        small = measure_engines(cases[2:], images[:1], "int8", files, seconds=0.0, least=2)
    assert [(row.mode, row.model) for row in rows] == [(engine, model.name) for model, engine in cases]
    dense = {row.mode: row.milliseconds for row in rows if row.model == "dense"}
    for row in rows:
        assert (row.task, row.precision, row.batch) == ("inference", "float32", 2)
        assert row.speedup == pytest.approx(dense[row.mode] / row.milliseconds)
        assert row.over_fastest == pytest.approx(min(dense.values()) / row.milliseconds)
        assert (row.peak_memory is None) == (row.mode != "torch")
    assert [(row.mode, row.precision, row.calls) for row in small] == [
        (engine, "int8", 2) for _, engine in cases[2:]
    ]
    assert not any(path.exists() for path in paths)


def test_refused(models: list[Contestant]) -> None:
    images = torch.randn(1, 3, 32, 32)
    dense, evit = models
    with pytest.raises(ValueError, match="onnxruntime does not compute in bfloat16 here: its CPU provider"):
        measure_engines([(dense, "onnxruntime")], images, "bfloat16")
    with pytest.raises(ValueError, match="torch does not compute in int8 here: int8 is for exported files"):
        measure_engines([(dense, "torch")], images, "int8")
    with pytest.raises(ValueError, match="dense, which others are compared with, is not run in openvino"):
        measure_engines([(dense, "torch"), (evit, "openvino")], images)
    with pytest.raises(ValueError, match="there is no engine 'ort': the nearest is onnxruntime"):
        measure_engines([(dense, "ort")], images)
    with pytest.raises(RuntimeError, match="the file cannot be loaded: ONNX Runtime says"):
        wrong = Path(__file__)
        measure_engines([(dense, "onnxruntime")], images, files={("dense", False): wrong})
