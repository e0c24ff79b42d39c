"""benchmarks/engines.py and engine_profiles.py: what belongs to the reduction, and what is written."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from evit_ext.benchmark import Row, contestants
from evit_ext.export import export_model

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
if not BENCHMARKS.exists():
    pytest.skip("tests run without the source tree", allow_module_level=True)
for package in ("onnxscript", "onnxruntime", "openvino"):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed: pip install 'evit_ext[openvino]'", allow_module_level=True)
sys.path.insert(0, str(BENCHMARKS))

import engine_profiles  # noqa: E402
import engines  # noqa: E402
from engine_profiles import Node, Profile, reduction_nodes  # noqa: E402

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2, "num_classes": 10}

#: A stage as an engine may run it: what is its own has names in capitals.
STAGE = {
    "input": Node("Input", ()),
    "keys": Node("FullyConnected", ("input",)),
    "attention": Node("MatMul", ("keys",)),
    "branch": Node("FullyConnected", ("attention",)),
    "sum": Node("Add", ("input", "branch")),
    "LOGITS": Node("MatMul", ("keys",)),
    "SCORES": Node("Softmax", ("LOGITS",)),
    "ORDER": Node("TopK", ("SCORES",)),
    "KEPT": Node("TopK", ("ORDER",)),
    "ROWS": Node("Reshape", ("sum",)),
    "TOKENS": Node("Gather", ("ROWS", "KEPT")),
    "OTHERS": Node("Gather", ("ROWS", "ORDER")),
    "FUSED": Node("MatMul", ("ORDER", "OTHERS")),
    "PREFIX": Node("Slice", ("sum",)),
    "NEW": Node("Concat", ("PREFIX", "TOKENS", "FUSED")),
    "norm": Node("LayerNormalization", ("NEW",)),
    "mlp": Node("FullyConnected", ("norm",)),
    "output": Node("Add", ("NEW", "mlp")),
}


@pytest.mark.parametrize("concatenation", ["Concat", "Concatenation"])
def test_what_belongs_to_the_reduction(concatenation: str) -> None:
    stage = {**STAGE, "NEW": STAGE["NEW"]._replace(kind=concatenation)}
    assert reduction_nodes(stage) == {name for name in stage if name.isupper()}
    dense = {name: node for name, node in STAGE.items() if name in ("input", "keys", "attention", "branch")}
    assert reduction_nodes(dense) == set()


def test_profiles(tmp_path: Path, one_thread: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of both engines, of a dense model and of one with two stages, in which each has its two TopK."""
    monkeypatch.setattr(engine_profiles, "CALLS", 2)
    dense, evit = contestants("vit_tiny_patch16_224", (0.6,), reduction={"drop_loc": (0, 1)}, **TINY)
    images = torch.randn(2, 3, 32, 32)
    for model, stages in ((dense, 0), (evit, 2)):
        export_model(model.model.eval(), tmp_path / "a.onnx", "onnx")
        for profile in (engine_profiles.profile_onnxruntime, engine_profiles.profile_openvino):
            found = profile(model.name, tmp_path / "a.onnx", images, 1)
            assert found.operators.get("TopK", 0) == 2 * stages and found.batch == 2
            assert 0 < found.milliseconds < 1000
            assert (found.reduction > 0) == (stages > 0) and found.reduction < 0.7 * found.milliseconds
            assert found.attention in ("one operator", "three operators")


def test_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row: dict[str, Any] = dict.fromkeys(Row.__dataclass_fields__, 1.5)
    row |= {"model": "dense", "task": "inference", "mode": "openvino", "precision": "float32", "batch": 1}
    profile = Profile("EViT", "openvino", 1, 8.0, 2.0, {"TopK": 2}, "one operator")
    options = argparse.Namespace(
        model="deit_tiny", engine=["torch", "openvino"], threads=1, output=tmp_path / "new" / "engines-cpu"
    )
    engines.report(options, [Row(**row)], {("torch", "int8"): "of files"}, [profile])
    out = capsys.readouterr().out
    assert "EViT   openvino      1  8.00          2.00     25.0  one operator" in out
    assert "not available:\ntorch, int8: of files" in out
    found = json.loads((tmp_path / "new" / "engines-cpu.json").read_text())
    assert set(found) == {"machine", "model", "rows", "not_available", "profiles"}
    assert {"processor", "commit", "openvino", "threads"} <= set(found["machine"])
    assert "onnxruntime" not in found["machine"]
    assert out.strip() in (tmp_path / "new" / "engines-cpu.md").read_text()
