"""benchmarks/end_to_end.py and onnx_rivals.py: who is measured, and what is written of them."""

from __future__ import annotations

import argparse
import copy
import json
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
if not BENCHMARKS.exists():
    pytest.skip("tests run without the source tree", allow_module_level=True)
sys.path.insert(0, str(BENCHMARKS))

import end_to_end  # noqa: E402
import growth  # noqa: E402
import onnx_rivals  # noqa: E402
from plain_evit import PlainEViT  # noqa: E402
from time_limit import Missing  # noqa: E402

from evit_ext.benchmark import Contestant, Row, contestants  # noqa: E402
from evit_ext.cpu import packed_weights  # noqa: E402

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
    kinds = {(group.task, group.mode) for group in every}
    assert kinds == {("inference", "eager"), ("inference", "compile"), ("training", "eager")}
    assert {group.precision for group in every} == {"float32", "bfloat16"}
    (all_rates,) = {group.batch for group in every if len(group.keep_rates) == 5}
    assert all_rates == 16
    assert {group.least for group in every if group.batch == 1} == {100}
    on_gpu = end_to_end.groups(options(device="cuda"))
    assert {group.batch for group in on_gpu} == {1, 32, 256, 320}
    assert len(set(on_gpu)) == len(on_gpu) == 2 * (3 * 4 + 1)
    quick = end_to_end.groups(options(quick=True))
    assert len(quick) == 3 and {group.keep_rates for group in quick} == {(0.7,)}
    quick = end_to_end.groups(options(quick=True, device="cuda"))
    assert {(group.precision, group.batch) for group in quick} == {("bfloat16", 256), ("bfloat16", 1)}
    assert {group.mode for group in quick} == {"eager", "compile", "cudagraph"}


def test_a_gpu_begins_with_what_tells_most() -> None:
    found = end_to_end.groups(options(device="cuda"))
    first = [(g.task, g.mode, g.batch) for g in found[:4]]
    assert first == list(end_to_end.FIRST) and {g.precision for g in found[:4]} == {"bfloat16"}
    compiles = [g.mode == "compile" for g in found[4:]]
    assert compiles == sorted(compiles)
    cheap = [g for g in found[4:] if g.mode != "compile"]
    assert [g.precision for g in cheap] == sorted(g.precision for g in cheap)
    assert all(g.expected_seconds() < 20 for g in cheap)


def row(model: str, group: end_to_end.Group) -> Row:
    about: dict[str, Any] = {"task": group.task, "mode": group.mode, "precision": group.precision}
    about |= {"batch": group.batch, "keep_rate": 0.7, "gmacs": None, "images_per_second": 1.0, "speedup": 1.0}
    about |= {"over_fastest": 1.0}
    about |= {"milliseconds_90": None, "milliseconds_99": None, "peak_memory": None, "calls": 5}
    return Row(model=model, milliseconds=1.0, **about)


def test_a_group_that_fails_or_does_not_fit_costs_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run as on a GPU, in which nothing is measured: what is written, and when."""
    stem = tmp_path / "sub" / "end-to-end-cuda"
    written: list[int] = []

    def run(group: end_to_end.Group, models: list[Contestant], *_: object) -> list[Row]:
        if stem.with_suffix(".json").exists():
            written.append(len(json.loads(stem.with_suffix(".json").read_text())["rows"]))
        if group.mode == "cudagraph":
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        return [row(entry.name, group) for entry in models]

    chosen = options(device="cuda", model="tiny", output=stem, minutes=0.5)
    monkeypatch.setattr(end_to_end, "parse", lambda: chosen)
    monkeypatch.setattr(end_to_end, "field", lambda *_: field())
    monkeypatch.setattr(end_to_end, "run", run)
    monkeypatch.setattr(end_to_end, "machine", lambda device: {"gpu": "NVIDIA Example 9000"})
    assert end_to_end.main() == 1
    results = json.loads(stem.with_suffix(".json").read_text())
    # In 30 seconds, nothing can be compiled.
    assert {row["mode"] for row in results["rows"]} == {"eager"} and len(results["rows"]) == 3 * 10
    assert len(results["left_out"]) == len(results["failures"]) == 8
    assert "compile (takes about 85 s" in results["left_out"][0]
    assert written == sorted(written) and written[-1] > 0
    for text in (capsys.readouterr().out, stem.with_suffix(".md").read_text()):
        assert (
            text.count("Left out: ") == 8 and "Failed: inference, bfloat16, batch 1, cudagraph: Runt" in text
        )
        assert "and more" not in text
    assert stem.with_suffix(".png").exists()


def test_one_image_in_four_may_be_decided_by_rounding() -> None:
    images = torch.arange(4.0)[:, None]
    off = torch.zeros(4, 1)
    for wrong, fine in ((0, True), (1, True), (2, False)):
        off[:wrong] = 1.0

        def model(x: torch.Tensor, off: torch.Tensor = off) -> torch.Tensor:
            return x + off

        if fine:
            end_to_end._assert_same(lambda x: x, model, images)
        else:
            with pytest.raises(AssertionError, match=r"2 of 4 images differ, by up to 0\.33"):
                end_to_end._assert_same(lambda x: x, model, images)
    with pytest.raises(AssertionError, match="4 of 4"):
        end_to_end._assert_same(lambda x: x, lambda x: x * float("nan"), images)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--minutes", "0"], "--minutes must be positive, got 0"),
        (["--seconds", "-1"], "--seconds must be positive, got -1"),
        (["--batch", "4", "0"], "--batch must be 1 or more, got 0"),
        (["--device", "cuda"], "needs a GPU"),
    ],
)
def test_bad_options(
    given: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name, module in (("end_to_end.py", end_to_end), ("growth.py", growth)):
        monkeypatch.setattr(sys, "argv", [name, *given])
        with pytest.raises(SystemExit):
            module.parse()
        assert said in capsys.readouterr().err


def test_a_gpu_has_a_time_limit_and_the_cpu_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for module, minutes in ((end_to_end, 6.5), (growth, 2.5)):
        monkeypatch.setattr(sys, "argv", ["x"])
        assert module.parse().minutes is None
        monkeypatch.setattr(sys, "argv", ["x", "--device", "cuda"])
        assert module.parse().minutes == minutes


def test_rows_and_files(tmp_path: Path, one_thread: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVIT_COMMIT", "abc")
    group = end_to_end.Group("inference", "float32", 2, "eager", (0.7,), 0.01, 5)
    with_onnx = onnx_rivals.available()
    rows = end_to_end.run(group, field(), torch.device("cpu"), with_onnx)
    names = ["dense", "EViT 0.7", "plain EViT 0.7"]
    if with_onnx:
        names += ["ONNX Runtime dense", "ONNX Runtime plain EViT 0.7"]
    assert [row.model for row in rows] == names
    for row in rows[3:]:
        assert row.mode == "onnxruntime" and row.peak_memory is None
    stem = tmp_path / "sub" / "end-to-end-cpu"
    chosen = argparse.Namespace(output=stem, device="cpu", model="tiny")
    end_to_end.write(chosen, rows, Missing(), "left out")
    end_to_end.draw(chosen, rows)
    results = json.loads(stem.with_suffix(".json").read_text())
    assert list(results) == ["machine", "left_out", "failures", "rows"]
    assert len(results["rows"]) == len(rows)
    assert "plain EViT 0.7" in stem.with_suffix(".md").read_text()
    assert stem.with_suffix(".png").stat().st_size > 10_000


@pytest.mark.parametrize("name", ["DynamicViT 0.7", "ToMe 0.7", "EViT 0.7, prepacked"])
def test_who_trains_and_who_is_compiled(name: str) -> None:
    dynamic = Contestant(name, torch.nn.Identity(), 0.7, None)
    group = end_to_end.Group("inference", "float32", 2, "eager", (0.7,), 0.0, 5)
    assert end_to_end.takes_part(dynamic, group)
    assert not end_to_end.takes_part(dynamic, end_to_end.replace(group, task="training"))
    assert not end_to_end.takes_part(dynamic, end_to_end.replace(group, mode="compile"))
    assert not end_to_end.takes_part(dynamic, end_to_end.replace(group, keep_rates=(0.5,)))


@pytest.mark.parametrize("task", ["inference", "training"])
def test_what_the_cpus_forwards_give_is_told_apart(task: str) -> None:
    """Also in training, where an EViT's attentions are not timm's either."""
    group = end_to_end.Group(task, "float32", 2, "eager", (0.7,), 0.0, 5)
    assert end_to_end.takes_part(Contestant(end_to_end.FASTER, torch.nn.Identity(), 1.0, None), group)


def test_prepacked_is_so_in_another_process() -> None:
    models = [end_to_end.Prepacked(field()[1].model)]
    models += [pickle.loads(pickle.dumps(models[0])), copy.deepcopy(models[0])]
    for model in models:
        blocks = [module for module in model.modules() if isinstance(module, torch.nn.Linear)][:-1]
        patches = [module for module in model.modules() if isinstance(module, torch.nn.Conv2d)]
        assert len(blocks) == 16 and len(patches) == 1
        assert all(module in packed_weights._PACKED for module in blocks + patches)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        first, *others = (model(images) for model in models)
    assert all(torch.equal(first, other) for other in others)


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
