"""`evit benchmark`: its table, its JSON, and what it refuses."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch

from evit_ext.cli import main

OPTIONS = ["--device", "cpu", "--batch-size", "1", "2", "--precision", "float32", "--seconds", "0.01"]
OPTIONS += ["--latency-calls", "10"]
SHORT = ["--batch-size", "2", "--seconds", "0.01"]


def test_table_and_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stem = tmp_path / "results" / "tiny"
    assert main(["benchmark", "deit_tiny", "--img-size", "32", *OPTIONS, "--output", str(stem)]) == 0
    out = capsys.readouterr().out
    assert "speed-up" in out and "MiB" in out and out.count("EViT 0.5") == 2
    rows = json.loads(stem.with_suffix(".json").read_text())["rows"]
    assert [(row["model"], row["batch"]) for row in rows] == [
        (name, batch) for batch in (1, 2) for name in ("dense", "EViT 0.7", "EViT 0.5")
    ]
    assert [row["milliseconds_90"] is not None and row["calls"] >= 10 for row in rows[:3]] == [True] * 3
    assert "EViT 0.7" in stem.with_suffix(".md").read_text()


def test_progress_can_be_switched_off(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["benchmark", "deit_tiny", "--img-size", "32", "--precision", "float32", "--keep-rate", "0.7"]
    assert main([*arguments, *SHORT]) == 0
    shown = capsys.readouterr().out
    assert main([*arguments, *SHORT, "--no-progress"]) == 0
    assert "benchmark: 1/1" in shown and "benchmark: 1/1" not in capsys.readouterr().out


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["benchmark", "dynamicvit_tiny", "--img-size", "32", *OPTIONS, "--keep-rate", "0.6", "--json"]
    assert main(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["model"] for row in found["rows"]] == ["dense", "DynamicViT 0.6"] * 2
    assert found["rows"][0]["gmacs"] > 1.1 * found["rows"][1]["gmacs"]


def test_engines(capsys: pytest.CaptureFixture[str]) -> None:
    """A table of all, which says what is not available and why."""
    for package in ("onnxscript", "onnxruntime", "openvino"):
        pytest.importorskip(package, reason=f"{package} is not installed: pip install 'evit_ext[openvino]'")
    arguments = ["benchmark", "deit_tiny", "--img-size", "32", "--keep-rate", "0.6", *SHORT]
    engines = ["--engine", "torch", "onnxruntime", "openvino", "--precision", "float32", "bfloat16", "int8"]
    assert main([*arguments, *engines, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    missing = {(left["engine"], left["precision"]) for left in found["not_available"]}
    assert {("torch", "int8"), ("onnxruntime", "bfloat16")} <= missing
    measured = {(row["mode"], row["precision"]) for row in found["rows"]}
    every = itertools.product(("torch", "onnxruntime", "openvino"), ("float32", "bfloat16", "int8"))
    assert measured.isdisjoint(missing) and measured | missing == set(every)
    assert all(row["over_fastest"] > 0 for row in found["rows"])
    assert main([*arguments, "--engine", "torch", "--precision", "float32", "int8"]) == 0
    out = capsys.readouterr().out
    assert "over fastest dense" in out and out.count("float32") == 2
    (line,) = (line.split() for line in out.splitlines() if line.startswith("not available  "))
    assert line[:5] == ["not", "available", "inference", "torch", "int8"] and set(line[5:]) == {"–"}
    assert "torch, int8: int8 is for exported files, which onnxruntime and openvino run" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--engine", "onnx"], "argument --engine: there is no engine 'onnx': the nearest is onnxruntime"),
        (
            ["--engine", "fast"],
            "there is no engine 'fast': expected one of torch, torch-compile, onnx",
        ),
        (["--engine", "torch", "--mode", "compile"], "--engine compares inference on the CPU: leave out"),
        (["--engine", "torch", "--task", "training"], "--engine compares inference on the CPU: leave out"),
        (["--engine", "torch", "--precision", "auto"], "--engine compares precisions by name"),
        (["--precision", "int8"], "--precision int8 is for --engine onnxruntime and openvino"),
    ],
)
def test_options_of_engines(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        status = main(["benchmark", "deit_tiny", *arguments])
    except SystemExit as end:
        status = end.code
    assert status == 2 and message in capsys.readouterr().err


def test_an_engine_that_is_not_installed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["benchmark", "deit_tiny", "--engine", "openvino"]) == 2
    assert capsys.readouterr().err == (
        "evit: error: OpenVINO needs the package openvino, which is not installed: pip install "
        "'evit_ext[openvino]'\n"
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("command", ["benchmark deit_tiny", "train --dataset digits"])
def test_no_gpu(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command.split(), "--device", "cuda"]) == 2
    assert "there is no GPU that PyTorch can use" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["deit_giant"], "there is no model 'deit_giant'"),
        (["deit_tiny", "--keep-rate", "1.5"], "1.5"),
        (["deit_tiny", "--mode", "cudagraph"], "CUDA graphs are for inference on a GPU"),
        (["resnet18"], "ResNet is not supported"),
    ],
)
def test_errors(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["benchmark", *arguments, *OPTIONS]) == 2
    assert message in capsys.readouterr().err
