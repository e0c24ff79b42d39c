"""The command evit eval, on stand-ins for the data and the model: what it loads, prints and refuses."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

import evit_ext
from evit_ext.cli import main
from evit_ext.export import export_model
from evit_ext.training import RunCheckpoints, TrainConfig


def draw(seed: int) -> Any:
    """A small EViT of keep rate 0.7, with weights large enough that classes differ."""
    vit = VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=4, num_heads=2, num_classes=5)
    generator = torch.Generator().manual_seed(seed)
    for parameter in vit.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    return evit_ext.apply(vit, 0.7).eval()


class Batch(NamedTuple):
    images: Tensor
    labels: Tensor
    unreadable: tuple[tuple[str, str], ...] = ()


class Data:
    """Images whose labels a model that was built with seed 1 knows, apart from three."""

    num_classes = named_classes = 5
    classes = words = ()
    val_batches = 3
    image: Any = None

    def __init__(
        self, config: TrainConfig, ranks: Any, micro_batch: int, training: bool, classes: Any, of_model: str
    ) -> None:
        assert not training and classes is None
        self.config, self.micro_batch = config, micro_batch

    def val(self) -> Iterator[Batch]:
        assert self.image["input_size"] == (3, 32, 32)
        images = torch.randn(12, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            labels = draw(1)(images).argmax(dim=1)
        labels[:3] = (labels[:3] + 1) % 5
        yield from map(Batch, images.split(self.micro_batch), labels.split(self.micro_batch))
        yield Batch(images[:0], labels[:0], (("val/bad.png", "truncated"),))


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> list[TrainConfig]:
    """Take the place of the data and of the model's building; returns the configurations of models built."""
    built: list[TrainConfig] = []

    def build_model(config: TrainConfig, num_classes: int) -> Any:
        assert num_classes == 5
        built.append(config)
        model = draw(2)
        if config.keep_rate is not None:
            evit_ext.set_keep_rate(model, config.keep_rate)
        return model.train()

    monkeypatch.setitem(sys.modules, "evit_ext.training.building", SimpleNamespace(build_model=build_model))
    monkeypatch.setitem(sys.modules, "evit_ext.training.loaders", SimpleNamespace(Loaders=Data))
    for name in ("RANK", "WORLD_SIZE", "SLURM_STEP_ID"):
        monkeypatch.delenv(name, raising=False)
    return built


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A run whose moving average is the model that knows the labels; its weights are another's."""
    TrainConfig(keep_rate=0.7, pretrained=True, precision="float32").save(tmp_path / "config.yaml")
    checkpoints = RunCheckpoints(tmp_path / "checkpoints")
    weights = {"model": draw(3).state_dict(), "model_ema": draw(1).state_dict()}
    checkpoints.save({**weights, "model_ema": None}, 10)
    checkpoints.save(weights, 20)
    return tmp_path


def evaluated(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["eval", *arguments, "--json", "--repeats", "1"]) == 0
    out: dict[str, Any] = json.loads(capsys.readouterr().out)
    return out


def test_a_run(capsys: pytest.CaptureFixture[str], run_folder: Path, stand_ins: list[TrainConfig]) -> None:
    rates = ["--keep-rate", "0.7", "1"]
    assert main(["eval", str(run_folder), "--last", "--batch-size", "5", *rates, "--repeats", "1"]) == 0
    out = capsys.readouterr().out
    assert f"weights: {run_folder}/checkpoints, the last: step 20, moving average" in out
    assert "precision: float32 (as asked)" in out
    lines = [line.split() for line in out.splitlines()]
    # 12 images in batches of 5; the batch without an image comes on top of these in the stand-in only.
    assert out.startswith("evaluate: 4/3  in ")
    (row,) = (line for line in lines if line[:1] == ["0.7"])
    # 9 of 12 images; 16 patches, of which 13, 11 and 9 tokens are left.
    assert row[1] == "75.00" and row[4] == "12" and row[-1] == "56.2"
    (dense,) = (line for line in lines if line[:1] == ["1"] and len(line) == len(row))
    assert dense[-1] == "100.0" and float(dense[-2]) > float(row[-2])
    assert "images that could not be read and were left out: 1\n  val/bad.png: truncated" in out
    assert not stand_ins[-1].pretrained


def test_weights_of_a_run(capsys: pytest.CaptureFixture[str], run_folder: Path) -> None:
    ema = evaluated(capsys, str(run_folder), "--last")
    plain = evaluated(capsys, str(run_folder), "--last", "--no-ema")
    assert ema["rows"][0]["top1"] == 75.0 > plain["rows"][0]["top1"]
    assert plain["weights"] == f"{run_folder}/checkpoints, the last: step 20"
    (run_folder / "checkpoints" / "checkpoint-000000020.pth").write_bytes(b"truncated")
    older = evaluated(capsys, str(run_folder), "--last")
    assert older["weights"].endswith("step 10") and older["rows"] != ema["rows"]
    assert main(["eval", str(run_folder), "--last", "--ema"]) == 2
    assert "has no moving average of the weights: leave out --ema" in capsys.readouterr().err


def test_a_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    torch.save({"model": draw(1).state_dict()}, tmp_path / "evit.pth")
    out = evaluated(capsys, "--model", "deit_small", "--checkpoint", str(tmp_path / "evit.pth"))
    (row,) = out["rows"]
    assert row["keep_rate"] == [0.7] and row["top1"] == 75.0 and row["images"] == 12
    assert row["tokens_kept_by_stage"] == [13 / 16, 11 / 16, 9 / 16]
    assert row["model_images_per_second"] > 0 and row["gmacs"] > 0
    assert out["unreadable"] == [{"path": "val/bad.png", "reason": "truncated"}]
    assert out["processes"] == 1 and "evit.pth" in out["weights"]


def test_pretrained(capsys: pytest.CaptureFixture[str], stand_ins: list[TrainConfig]) -> None:
    assert evaluated(capsys, "--model", "deit_small", "--pretrained")["weights"] == "pretrained"
    assert stand_ins[-1].pretrained
    assert main(["eval", "--pretrained", "--repeats", "0"]) == 0
    assert "–" in capsys.readouterr().out.partition("next:")[0].splitlines()[-4].split()


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_engines(engine: str, capsys: pytest.CaptureFixture[str], run_folder: Path) -> None:
    """The same answers, as the same file is run; each keep rate has one of its own."""
    for package in ("onnxscript", "onnxruntime", "openvino"):
        pytest.importorskip(package, reason=f"{package} is not installed: pip install 'evit_ext[openvino]'")
    rates = ["--keep-rate", "0.7", "0.4"]
    out = evaluated(capsys, str(run_folder), "--last", "--engine", engine, *rates)
    expected = evaluated(capsys, str(run_folder), "--last", *rates)
    assert out["engine"] == engine and expected["engine"] == "torch"
    assert out["precision"] == "float32 (as asked)"
    for row, wanted in zip(out["rows"], expected["rows"], strict=True):
        assert row["top1"] == wanted["top1"] and row["loss"] == pytest.approx(wanted["loss"], rel=1e-4)
        assert row["tokens_kept"] == wanted["tokens_kept"] and row["gmacs"] == wanted["gmacs"]
    assert out["rows"][0]["top1"] == 75.0 and abs(out["rows"][0]["loss"] - out["rows"][1]["loss"]) > 1e-3


def test_an_exported_file(capsys: pytest.CaptureFixture[str], run_folder: Path) -> None:
    """It is the file that is evaluated, at its keep rate, whatever the weights of the run."""
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install 'evit_ext[export]'")
    file = run_folder / "a.onnx"
    images = torch.randn(12, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    exported = export_model(draw(1), file, "onnx", calibration=images)
    given = ("--engine", "onnxruntime", "--exported", str(file), "--precision", "auto")
    out = evaluated(capsys, str(run_folder), "--last", "--no-ema", *given)
    assert out["engine"] == f"onnxruntime, {file}"
    assert out["precision"] == "float32 (and int8 where the file has it)"
    (row,) = out["rows"]
    assert row["keep_rate"] == [0.7]
    assert exported.agreement is not None and row["top1"] >= 75.0 - 100 / 12 * 2
    assert main(["eval", str(run_folder), *given, "--keep-rate", "0.5"]) == 2
    assert "--keep-rate is for a model, and a file of --exported has its own" in capsys.readouterr().err
    import onnx

    from evit_ext.export.onnx_file import write_onnx

    other = replace(exported.metadata, input_size=(3, 64, 64))
    write_onnx(onnx.load(str(file)), file, other)
    assert main(["eval", str(run_folder), "--last", *given]) == 2
    assert "takes images of 3 x 64 x 64, and the model 3 x 32 x 32" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pretrained", "--engine", "ort"], "there is no engine 'ort': the nearest is onnxruntime"),
        (["--pretrained", "--exported", "a.xml"], "--exported is for --engine onnxruntime or openvino, got"),
        (["--pretrained", "--engine", "openvino", "--exported", "a.xml"], "there is no a.xml"),
        (
            ["--pretrained", "--engine", "openvino", "--device", "cuda"],
            "on the CPU here, got --device cuda",
        ),
        (
            ["--pretrained", "--engine", "onnxruntime", "--precision", "bfloat16"],
            "onnxruntime does not compute in bfloat16 here: its CPU provider",
        ),
    ],
)
def test_bad_engines(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    pytest.importorskip("openvino", reason="openvino is not installed: pip install 'evit_ext[openvino]'")
    try:
        status = main(["eval", *arguments])
    except SystemExit as end:
        status = end.code
    assert status == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--model", "deit_small"],
            "expected a run's folder, or a model with one of --checkpoint FILE, --pretrained; got none",
        ),
        (["--pretrained", "--checkpoint", "x"], "one of --checkpoint FILE, --pretrained; got more than one"),
        (["nowhere"], "there is no model 'nowhere'"),
        (["deit_small", "--model", "deit_tiny", "--pretrained"], "expected one model, got deit_small and"),
        (["--pretrained", "--batch-size", "0"], "expected --batch-size of at least 1"),
        (["--pretrained", "--keep-rate", "1.5"], "keep_rate must be in (0, 1], got 1.5"),
        (["--checkpoint", "nowhere.pth"], "nowhere.pth"),
    ],
)
def test_bad_input(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert main(["eval", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("evit: error: ") and message in captured.err


def test_no_limit_of_unreadable_images(capsys: pytest.CaptureFixture[str], run_folder: Path) -> None:
    """An evaluation leaves out all that it cannot read and lists them: a limit would do nothing."""
    with pytest.raises(SystemExit):
        main(["eval", str(run_folder), "--max-unreadable", "3"])
    assert "unrecognized arguments: --max-unreadable" in capsys.readouterr().err


def test_a_run_without_a_checkpoint(capsys: pytest.CaptureFixture[str], run_folder: Path) -> None:
    for path in (run_folder / "checkpoints").iterdir():
        path.unlink()
    assert main(["eval", str(run_folder)]) == 2
    assert f"there is no checkpoint in {run_folder}/checkpoints" in capsys.readouterr().err
