"""`evit benchmark`: its table, its JSON, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from evit_ext.cli import main

OPTIONS = ["--device", "cpu", "--batch-size", "1", "2", "--precision", "float32", "--seconds", "0.01"]
OPTIONS += ["--latency-calls", "10"]


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


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["benchmark", "dynamicvit_tiny", "--img-size", "32", *OPTIONS, "--keep-rate", "0.6", "--json"]
    assert main(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["model"] for row in found["rows"]] == ["dense", "DynamicViT 0.6"] * 2
    assert found["rows"][0]["gmacs"] > 1.1 * found["rows"][1]["gmacs"]


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
