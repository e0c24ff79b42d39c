"""benchmarks/end_to_end.py and onnx_rivals.py: who is measured, and what is written of them."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
if not BENCHMARKS.exists():
    pytest.skip("tests run without the source tree", allow_module_level=True)
sys.path.insert(0, str(BENCHMARKS))

import end_to_end  # noqa: E402
import onnx_rivals  # noqa: E402
from plain_evit import PlainEViT  # noqa: E402

from evit_ext.benchmark import Contestant, contestants  # noqa: E402

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 2, "num_classes": 10}


def options(**changed: object) -> argparse.Namespace:
    chosen = {"device": "cpu", "quick": False, "batch": None, "seconds": None, "latency_calls": 100}
    return argparse.Namespace(**{**chosen, "keep_rates": list(end_to_end.KEEP_RATES), **changed})


def field() -> list[Contestant]:
    dense, evit = contestants("vit_tiny_patch16_224", (0.7,), **TINY)
    plain = PlainEViT(dense.model, 0.7, (1, 2, 3)).eval()
    return [dense, evit, Contestant("plain EViT 0.7", plain, 0.7, evit.gmacs)]


def test_groups() -> None:
    """All that was promised is among them, and a quick run is short."""
    every = end_to_end.groups(options())
    assert {group.batch for group in every} == {1, 4, 16}
    assert {(group.task, group.modes) for group in every} == {
        ("inference", ("eager",)),
        ("inference", ("compile",)),
        ("training", ("eager",)),
    }
    assert {group.precision for group in every} == {"float32", "bfloat16"}
    (all_rates,) = {group.batch for group in every if len(group.keep_rates) == 5}
    assert all_rates == 16
    assert {group.least for group in every if group.batch == 1} == {100}
    on_gpu = end_to_end.groups(options(device="cuda"))
    assert {group.batch for group in on_gpu} == {1, 8, 64, 256}
    assert ("compile", "cudagraph") in {group.modes for group in on_gpu}
    quick = end_to_end.groups(options(quick=True))
    assert len(quick) == 3 and {group.keep_rates for group in quick} == {(0.7,)}


def test_rows_and_files(tmp_path: Path, one_thread: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVIT_COMMIT", "abc")
    group = end_to_end.Group("inference", "float32", 2, ("eager",), (0.7,), 0.01, 5)
    with_onnx = onnx_rivals.available()
    rows = end_to_end.run(group, field(), torch.device("cpu"), with_onnx)
    names = ["dense", "EViT 0.7", "plain EViT 0.7"]
    if with_onnx:
        names += ["ONNX Runtime dense", "ONNX Runtime plain EViT 0.7"]
    assert [row.model for row in rows] == names
    for row in rows[3:]:
        assert row.mode == "onnxruntime" and row.peak_memory is None
    stem = tmp_path / "sub" / "end-to-end-cpu"
    end_to_end.write(
        argparse.Namespace(output=stem, device="cpu", model="tiny"), rows, end_to_end.table(rows), "left out"
    )
    results = json.loads(stem.with_suffix(".json").read_text())
    assert list(results) == ["machine", "rows"] and len(results["rows"]) == len(rows)
    assert "plain EViT 0.7" in stem.with_suffix(".md").read_text()
    assert stem.with_suffix(".png").stat().st_size > 10_000


def test_who_trains_and_who_is_compiled() -> None:
    dynamic = Contestant("DynamicViT 0.7", torch.nn.Identity(), 0.7, None)
    group = end_to_end.Group("inference", "float32", 2, ("eager",), (0.7,), 0.0, 5)
    assert end_to_end.takes_part(dynamic, group)
    assert not end_to_end.takes_part(dynamic, end_to_end.replace(group, task="training"))
    assert not end_to_end.takes_part(dynamic, end_to_end.replace(group, modes=("compile",)))
    assert not end_to_end.takes_part(dynamic, end_to_end.replace(group, keep_rates=(0.5,)))


def test_a_wrong_model_is_not_timed() -> None:
    models = field()
    images = torch.randn(2, 3, 32, 32)
    with pytest.raises(AssertionError):
        end_to_end._assert_same(models[0].model, models[1].model, images)


def test_onnx_runtime_computes_the_same(one_thread: None) -> None:
    for name in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(name)
    images = torch.randn(3, 3, 32, 32)
    dense, _, plain = field()
    for entry in (dense, plain):
        exported = onnx_rivals.OnnxModel(entry.model, images)
        with torch.inference_mode():
            torch.testing.assert_close(exported(images), entry.model(images), rtol=1e-4, atol=1e-5)


def test_left_out_in_words(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setitem(sys.modules, "onnx", argparse)
    assert not onnx_rivals.available()
    assert "onnxruntime is not installed: pip install 'evit_ext[bench]'" in capsys.readouterr().out
