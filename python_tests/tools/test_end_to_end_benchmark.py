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
import end_to_end_targets  # noqa: E402
import growth  # noqa: E402
import onnx_rivals  # noqa: E402
from end_to_end_targets import AIMS  # noqa: E402
from plain_evit import PlainEViT  # noqa: E402
from time_limit import TimeLimit  # noqa: E402

from evit_ext import packed_weights  # noqa: E402
from evit_ext.benchmark import Contestant, Row, contestants  # noqa: E402

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
    assert len(set(on_gpu)) == len(on_gpu) == 2 * (3 * 4 + 1)
    quick = end_to_end.groups(options(quick=True))
    assert len(quick) == 3 and {group.keep_rates for group in quick} == {(0.7,)}
    quick = end_to_end.groups(options(quick=True, device="cuda"))
    assert {(group.precision, group.batch) for group in quick} == {("bfloat16", 256), ("bfloat16", 1)}
    assert {group.modes for group in quick} == {("eager",), ("compile",), ("cudagraph",)}


def test_a_gpu_begins_with_what_is_aimed_at() -> None:
    found = end_to_end.groups(options(device="cuda"))
    first = [(g.task, g.precision, g.batch, g.modes) for g in found[:4]]
    assert first == [(aim.task, "bfloat16", aim.batch, (aim.mode,)) for aim in AIMS]
    rest = found[4:]
    assert [g.compiles for g in rest] == sorted(g.compiles for g in rest)
    cheap = [g for g in rest if not g.compiles]
    assert [g.precision for g in cheap] == sorted(g.precision for g in cheap)
    assert all(g.expected_seconds() < 20 for g in cheap)
    # With other batches nothing is aimed at, but the order is the same.
    other = end_to_end.groups(options(device="cuda", batch=[2, 4]))
    assert {g.batch for g in other if len(g.keep_rates) == 5} == {4} and not other[0].compiles


def row(model: str, milliseconds: float, **changed: Any) -> Row:
    about: dict[str, Any] = {"task": "inference", "mode": "compile", "precision": "bfloat16", "batch": 256}
    about |= {"keep_rate": 0.7, "gmacs": None, "images_per_second": 1.0, "speedup": 1.0, "calls": 5}
    about |= {"milliseconds_90": None, "milliseconds_99": None, "peak_memory": None, **changed}
    return Row(model=model, milliseconds=milliseconds, **about)


def test_targets() -> None:
    rows = [row("dense", 30.0), row("EViT 0.7", 20.0), row("EViT 0.5", 1.0), row("plain EViT 0.7", 90.0)]
    rows += [row("dense", 12.0, mode="cudagraph", batch=1), row("EViT 0.7", 10.0, mode="cudagraph", batch=1)]
    rows += [row("plain EViT 0.7", 3.0, mode="eager"), row("dense", 1.0, task="training", mode="eager")]
    rows += [row("dense", 1.0, precision="float32"), row("EViT 0.7", 9.0, precision="float32")]
    found = end_to_end_targets.targets(rows)
    assert [(target.found, target.met) for target in found] == [
        ("1.50 times", True),
        ("1.20 times", False),
        ("not measured", None),
        ("not measured", None),
    ]
    assert end_to_end.verdict(found).startswith("targets met: 1 of 4; missed: EViT 0.7 over dense, inference")


def measured(group: end_to_end.Group, models: list[Contestant], *_: object) -> list[Row]:
    about = {"task": group.task, "mode": group.modes[0], "precision": group.precision, "batch": group.batch}
    return [row(entry.name, 2.0 if "EViT" in entry.name else 4.0, **about) for entry in models]


def run_main(monkeypatch: pytest.MonkeyPatch, stem: Path, measure: Any, minutes: float) -> tuple[int, dict]:
    chosen = options(device="cuda", model="tiny", output=stem, minutes=minutes)
    monkeypatch.setattr(end_to_end, "parse", lambda: chosen)
    monkeypatch.setattr(end_to_end, "field", lambda *_: field())
    monkeypatch.setattr(end_to_end, "run", measure)
    monkeypatch.setattr(end_to_end, "machine", lambda device: {"gpu": "NVIDIA Example 9000"})
    monkeypatch.setattr(end_to_end, "TimeLimit", lambda minutes: TimeLimit(minutes, lambda: 0.0))
    code = end_to_end.main()
    return code, json.loads(stem.with_suffix(".json").read_text())


def test_what_there_is_no_time_for_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run as on a GPU, in which nothing is measured: what is written, and when."""
    stem = tmp_path / "end-to-end-cuda"
    seen: list[dict[str, Any]] = []

    def measure(*given: Any) -> list[Row]:
        if stem.with_suffix(".json").exists():
            seen.append(json.loads(stem.with_suffix(".json").read_text()))
        return measured(*given)

    code, results = run_main(monkeypatch, stem, measure, minutes=0.3)
    # Of 18 seconds, compiling alone is expected to take more.
    assert code == 0 and not any(row["mode"] == "compile" for row in results["rows"])
    assert (
        len(results["left_out"]) == 8
        and "it would take about 85 s, and 18 s were left" in results["left_out"][0]
    )
    assert [target["met"] for target in results["targets"]] == [None, True, False, True]
    # Before, too, the file said what was still to come.
    assert len(seen) == 17 and seen[0]["left_out"][1].endswith(": not yet")
    for text in (capsys.readouterr().out, stem.with_suffix(".md").read_text()):
        assert "targets met: 2 of 4; missed: " in text and "not measured: EViT 0.7 over dense" in text
        assert text.count("Left out: ") == 8
    assert stem.with_suffix(".png").exists() and not list(tmp_path.glob("*.part"))


def test_a_model_that_fails_does_not_cost_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure(group: end_to_end.Group, models: list[Contestant], *rest: Any) -> list[Row]:
        if any(entry.name.startswith("plain") for entry in models) and group.modes == ("cudagraph",):
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        if group.modes == ("compile",):
            raise TimeoutError("it took more than 9 s")
        return measured(group, models)

    code, results = run_main(monkeypatch, tmp_path / "cuda", measure, minutes=30)
    assert code == 1 and results["left_out"] == []
    graphs = [row["model"] for row in results["rows"] if row["mode"] == "cudagraph"]
    assert graphs == ["dense", "EViT 0.7"] * 8
    # Once each: where it took too long, it is not tried again.
    assert len(results["failures"]) == 16
    assert "RuntimeError: operation not permitted when stream is capturing" in capsys.readouterr().out
    assert "and more" not in (tmp_path / "cuda.md").read_text()


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
    chosen = argparse.Namespace(output=stem, device="cpu", model="tiny")
    end_to_end.write(chosen, end_to_end.Results(rows, [], []), "left out")
    end_to_end.draw(chosen, rows)
    results = json.loads(stem.with_suffix(".json").read_text())
    assert list(results) == ["machine", "left_out", "failures", "rows"]
    assert len(results["rows"]) == len(rows)
    assert "plain EViT 0.7" in stem.with_suffix(".md").read_text()
    assert stem.with_suffix(".png").stat().st_size > 10_000


@pytest.mark.parametrize("name", ["DynamicViT 0.7", "EViT 0.7, prepacked"])
def test_who_trains_and_who_is_compiled(name: str) -> None:
    dynamic = Contestant(name, torch.nn.Identity(), 0.7, None)
    group = end_to_end.Group("inference", "float32", 2, ("eager",), (0.7,), 0.0, 5)
    assert end_to_end.takes_part(dynamic, group)
    assert not end_to_end.takes_part(dynamic, end_to_end.replace(group, task="training"))
    assert not end_to_end.takes_part(dynamic, end_to_end.replace(group, modes=("compile",)))
    assert not end_to_end.takes_part(dynamic, end_to_end.replace(group, keep_rates=(0.5,)))


@pytest.mark.parametrize("task", ["inference", "training"])
def test_what_the_cpus_forwards_give_is_told_apart(task: str) -> None:
    """Also in training, where an EViT's attentions are not timm's either."""
    group = end_to_end.Group(task, "float32", 2, ("eager",), (0.7,), 0.0, 5)
    assert end_to_end.takes_part(Contestant(end_to_end.FASTER, torch.nn.Identity(), 1.0, None), group)


def test_prepacked_is_so_in_another_process() -> None:
    packed = packed_weights._PACKED
    before = len(packed)
    models = [end_to_end.Prepacked(field()[1].model)]
    models += [pickle.loads(pickle.dumps(models[0])), copy.deepcopy(models[0])]
    assert len(packed) == before + 3 * 16
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
