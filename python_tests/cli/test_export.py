"""The command evit export: what it loads, writes, prints and refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from image_data import crop
from torch import Tensor

import evit_ext
from evit_ext import models
from evit_ext.cli import main
from evit_ext.export import read_metadata
from evit_ext.training import RunCheckpoints, load_config

SMALL = ["--img-size", "32", "--num-classes", "5", "--model-args", "depth=2", "--drop-loc", "0", "1"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    monkeypatch.chdir(tmp_path)


def small(seed: int) -> Any:
    torch.manual_seed(seed)
    model = models.deit_tiny(keep_rate=0.5, img_size=32, num_classes=5, depth=2, drop_loc=(0, 1)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def images() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def logits(file: str) -> Tensor:
    with torch.no_grad():
        return torch.export.load(file).module()(images())


def expected(model: Any) -> Tensor:
    with torch.no_grad():
        return model(images())


def test_a_folder_for_the_hub(capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(small(1).state_dict(), "weights.pth")
    Path("names.txt").write_text("a\nb\nc\nd\ne\n")
    arguments = ["--checkpoint", "weights.pth", "--keep-rate", "0.5", "--classes", "names.txt", *SMALL]
    assert main(["export", "deit_tiny", *arguments, "--format", "hf", "--crop-pct", "0.8"]) == 0
    out = capsys.readouterr().out
    assert "written: deit_tiny-hf, keep rate 0.5\nto load it: evit_ext.from_pretrained('deit_tiny-hf')" in out
    model: Any = evit_ext.from_pretrained("deit_tiny-hf")
    assert torch.equal(expected(model), expected(small(1)))
    assert model.pretrained_cfg["label_names"] == list("abcde") and model.pretrained_cfg["crop_pct"] == 0.8
    assert main(["export", "deit_tiny", *arguments, "--format", "hf", "--max-batch", "4"]) == 2
    assert "--max-batch is for files" in capsys.readouterr().err


def test_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(small(1).state_dict(), "weights.pth")
    Path("names.txt").write_text("a\nb\nc\nd\ne\n")
    arguments = ["--checkpoint", "weights.pth", "--keep-rate", "0.5", "--classes", "names.txt", *SMALL]
    assert main(["export", "deit_tiny", *arguments]) == 0
    out = capsys.readouterr().out
    assert "model: deit_tiny, keep rate 0.5\nweights: weights.pth" in out and "images: 3 x 32 x 32" in out
    assert "written: deit_tiny.pt2, pt2, " in out and "at batches of 1 and 3: differs by at most " in out
    torch.testing.assert_close(logits("deit_tiny.pt2"), expected(small(1)), rtol=1e-4, atol=1e-5)
    metadata = read_metadata("deit_tiny.pt2")
    assert metadata.classes == ("a", "b", "c", "d", "e") and metadata.model == "deit_tiny"


@pytest.mark.parametrize("ema", [True, False])
def test_a_run(ema: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its model, its number of classes, which the configuration does not have, and its newest weights."""
    config = load_config(
        model="deit_tiny", keep_rate=0.5, img_size=32, model_args={"depth": 2}, drop_loc=(0, 1), crop_pct=0.7
    )
    Path("run").mkdir()
    Path("run/config.yaml").write_text(config.to_yaml())
    checkpoints = RunCheckpoints("run/checkpoints")
    for step in (1, 2):
        average = {"model_ema": small(7).state_dict()} if ema else {}
        checkpoints.save({"model": small(step).state_dict(), **average}, step)
    assert main(["export", "run", "--last", "-o", "a.pt2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["file"] == "a.pt2" and found["metadata"]["keep_rate"] == [0.5]
    assert found["metadata"]["crop_pct"] == 0.7 and found["batches"] == [1, 3]
    assert found["weights"].endswith("step 2, moving average" if ema else "step 2")
    torch.testing.assert_close(logits("a.pt2"), expected(small(7 if ema else 2)), rtol=1e-4, atol=1e-5)


def test_unequal_keep_rates_of_random_weights(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--random-weights", "--keep-rate", "0.9", "0.6", "--max-batch", "4", *SMALL]
    assert main(["export", "dynamicvit_tiny", *arguments]) == 0
    assert "keep rate 0.9 0.6\nweights: random" in capsys.readouterr().out
    with pytest.raises(AssertionError, match="<= 4"):
        torch.export.load("dynamicvit_tiny.pt2").module()(torch.zeros(5, 3, 32, 32))


def test_int8(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Calibrated on images of a folder; what it says of the result is what Python gets."""
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install 'evit_ext[export]'")
    for number in range(8):
        path = tmp_path / "photos" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        crop(number % 2, number).save(path)
    torch.save(small(1).state_dict(), "weights.pth")
    of_weights = ["--checkpoint", "weights.pth", "--keep-rate", "0.5", *SMALL]
    arguments = [*of_weights, "--format", "onnx", "--int8", "--calibration", "photos"]
    assert main(["export", "deit_tiny", *arguments, "--calibration-images", "6"]) == 0
    out = capsys.readouterr().out
    assert "written: deit_tiny-int8.onnx, onnx, " in out
    assert "int8, calibrated on 5 images and compared with the model on 1 others: the same class for " in out
    assert "evit eval deit_tiny --checkpoint weights.pth --engine onnxruntime --exported deit_tiny" in out
    assert read_metadata("deit_tiny-int8.onnx").quantization == "int8"


def test_names_of_imagenet(monkeypatch: pytest.MonkeyPatch) -> None:
    from evit_ext.cli.export import _imagenet_classes

    names = _imagenet_classes(models.deit_tiny(img_size=32))
    assert names is not None and len(names) == 1000 and names[0].startswith("tench")
    assert _imagenet_classes(models.deit_tiny(img_size=32, num_classes=5)) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["deit_tny", "--random-weights"], "there is no model 'deit_tny': the nearest names are deit_tiny"),
        (["deit_tiny"], "got none of these"),
        (["deit_tiny", "--random-weights", "--checkpoint", "a.pth"], "got more than one of these"),
        (["."], "is not the folder of a run"),
        (["resnet18", "--random-weights"], "ResNet is not supported"),
        (["deit_tiny", "--random-weights", "--classes", "no.txt"], "no.txt"),
        (["deit_tiny", "--random-weights", "--keep-rate", "0", *SMALL], "keep_rate must be in (0, 1]"),
        (["deit_tiny", "--random-weights", "--output", "no/a.pt2", *SMALL], "there is no folder no"),
        (["deit_tiny", "--random-weights", "--max-batch", "1", *SMALL], "max_batch must be at least 2"),
        (
            ["deit_tiny", "--random-weights", "--format", "onnx", "--int8"],
            "--int8 needs images like those that the model will see: give a folder of them with --calib",
        ),
        (
            ["deit_tiny", "--random-weights", "--format", "onnx", "--int8", "--calibration", "no", *SMALL],
            "there is no folder no of images to calibrate on",
        ),
        (["deit_tiny", "--random-weights", "--int8"], "--int8 is for --format onnx and openvino"),
        (["deit_tiny", "--random-weights", "--calibration", "."], "are for --int8"),
        (
            ["deit_tiny", "--random-weights", "--format", "openvino", "-o", "a.onnx", *SMALL],
            "OpenVINO's file of the graph must have a name that ends in .xml, got a.onnx",
        ),
    ],
)
def test_errors(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("evit: error: ") and message in captured.err
    assert captured.err.count("\n") == 1 and not captured.out
    assert not list(Path().iterdir())


def test_missing_packages(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("evit_ext.export.packages.importlib.util.find_spec", lambda name: None, raising=True)
    assert main(["export", "deit_tiny", "--random-weights", "--format", "onnx", *SMALL]) == 2
    assert capsys.readouterr().err == (
        "evit: error: ONNX needs the package onnx, which is not installed: pip install 'evit_ext[export]'\n"
    )
