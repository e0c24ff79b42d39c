"""Runs of `evit train`: the same whatever the processes, and again from their own file; what they refuse."""

from __future__ import annotations

import csv
import itertools
import json
from pathlib import Path
from typing import Any

import image_data
import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from training import runs

from evit_ext.cli import main

#: Two epochs of three steps, each of six micro-batches of two images, whoever takes them.
SHARED = [*runs.SMALL, "--batch-size", "12", "--micro-batch", "2", "--checkpoint-every", "none"]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 38 training and 10 validation images."""
    return image_data.write_folder(tmp_path_factory.mktemp("images") / "data", train=19, val=5)


@pytest.fixture(scope="module")
def alone(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    runs.train(folder, [*SHARED, "--data", str(images)])
    return folder


def numbers(folder: Path, name: str) -> dict[tuple[str, str], float]:
    """Return a column of metrics.csv by step and kind."""
    return {(row["step"], row["kind"]): float(row[name]) for row in runs.metrics(folder) if row[name]}


@pytest.mark.parametrize(
    ("processes", "options"),
    [(2, []), (3, []), (2, ["--sharding", "fsdp"])],
    ids=["two", "three", "fsdp"],
)
def test_the_same_with_more_processes(
    images: Path, alone: Path, tmp_path: Path, processes: int, options: list[str]
) -> None:
    """With mixup, drop path, augmentation, EMA and a falling keep rate: all are the micro-batches' own."""
    folder = tmp_path / "run"
    runs.train(folder, [*SHARED, "--data", str(images), *options], processes)
    for name, tolerance in (("loss", 2e-6), ("grad_norm", 5e-6)):
        expected, got = numbers(alone, name), numbers(folder, name)
        assert got.keys() == expected.keys()
        for key, value in expected.items():
            assert got[key] == pytest.approx(value, rel=tolerance), (name, key)
    assert numbers(folder, "top1") == numbers(alone, "top1")  # every image counted once
    first, second = (load_file(path / "last.safetensors") for path in (alone, folder))
    for key, value in first.items():
        torch.testing.assert_close(second[key], value, rtol=0, atol=2e-5, msg=key)


def test_its_own_file_reproduces_a_run(alone: Path, tmp_path: Path) -> None:
    runs.train(tmp_path / "again", ["--recipe", str(alone / "config.yaml")])
    runs.assert_same_run(tmp_path / "again", alone)
    assert (tmp_path / "again" / "config.yaml").read_text() == (alone / "config.yaml").read_text()


def test_what_a_run_leaves(alone: Path) -> None:
    summary = json.loads((alone / "summary.json").read_text())
    assert summary["steps"] == 6 and summary["images"] == 72 and summary["keep_rate"] == 0.6
    assert summary["last"]["top1"] == numbers(alone, "top1")["6", "val"]
    rows = runs.metrics(alone)
    assert [row["step"] for row in rows if row["kind"] == "train"] == [str(step) for step in range(1, 7)]
    assert [row["kind"] for row in rows if row["step"] == "6"] == ["train", "epoch", "val", "ema"]
    assert rows[-1]["tokens_kept"] != "1.0"
    config = yaml.safe_load((alone / "config.yaml").read_text())
    assert config["keep_rate"] == 0.6 and config["model_args"]["embed_dim"] == 24


def test_a_finished_run_is_not_trained_again(alone: Path, images: Path) -> None:
    weights, metrics = load_file(alone / "last.safetensors"), runs.metrics(alone)
    text = runs.train(alone, [*SHARED, "--data", str(images)])
    assert "goes on from" in text and "epoch 1/2" not in text and "best" in text
    assert runs.metrics(alone) == metrics
    for key, value in load_file(alone / "last.safetensors").items():
        assert torch.equal(value, weights[key]), key


def test_evaluation_of_a_run(alone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(alone), "--no-ema", "--json", "--device", "cpu"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert row["top1"] == numbers(alone, "top1")["6", "val"]


def test_batch_norms_of_several_processes(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All evaluate with the running means that are saved, those of the moving average, too."""
    folder = tmp_path / "run"
    model = ["--model", "lvvit_tiny", "--model-args", "embed_dim=24", "depth=4", "num_heads=2"]
    options = [*SHARED, *model, "--drop-loc", "1", "--mixup", "0", "--cutmix", "0", "--lr", "1e-6"]
    runs.train(folder, [*options, "--data", str(images)], 2)
    for kind, option in (("val", "--no-ema"), ("ema", "--ema")):
        assert (
            main(["eval", str(folder), "--last", option, "--json", "--device", "cpu", "--repeats", "0"]) == 0
        )
        (row,) = json.loads(capsys.readouterr().out)["rows"]
        assert row["loss"] == pytest.approx(numbers(folder, "loss")["6", kind], rel=2e-6)


def test_the_best_weights_are_the_first_of_equals(images: Path, tmp_path: Path) -> None:
    """With a learning rate of next to nothing, all evaluations are equal."""
    options = [*SHARED, "--lr", "1e-12", "--min-lr", "0", "--warmup-lr", "0", "--data", str(images)]
    runs.train(tmp_path / "run", options)
    assert len({numbers(tmp_path / "run", "top1")[step, "val"] for step in ("3", "6")}) == 1
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    with safe_open(tmp_path / "run" / "best.safetensors", "pt") as file:
        assert file.metadata()["weights"] == "model"
        assert file.metadata()["epoch"] == str(summary["best"]["epoch"]) == "2"


def test_in_parts_from_one_process_to_two(images: Path, tmp_path: Path) -> None:
    """A run of one process has its optimizer's state by number, one in parts by name."""
    folder = tmp_path / "run"
    options = [*SHARED, "--data", str(images), "--sharding", "fsdp", "--checkpoint-every", "1"]
    options += ["--keep-checkpoints", "9"]
    runs.train(folder, options)
    expected = numbers(folder, "loss")
    states = [torch.load(path, weights_only=True) for path in sorted((folder / "checkpoints").iterdir())]
    seconds = [state["training_seconds"] for state in states]
    assert all(first < second for first, second in itertools.pairwise(seconds))
    for path in sorted((folder / "checkpoints").iterdir())[4:]:
        path.unlink()
    assert "goes on from" in runs.train(folder, options, 2)
    assert numbers(folder, "loss") == pytest.approx(expected, rel=2e-6)


def test_another_run_in_the_folder(alone: Path, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [*SHARED, "--data", str(images), "--output", str(alone), "--device", "cpu"]
    assert main(["train", *options, "--lr", "0.5"]) == 2
    assert "another configuration (lr was 0.003, is 0.5)" in capsys.readouterr().err
    assert main(["train", *options, "--resume", "never"]) == 2
    assert "has checkpoints, the newest of step 6" in capsys.readouterr().err
    before = {path: path.read_bytes() for path in alone.rglob("*") if path.is_file()}
    assert main(["train", *options, "--data", "/nowhere"]) == 2  # which may change, but is not there
    assert {path: path.read_bytes() for path in alone.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--batch-size", "13"],
            "batch_size 13 is not a multiple of 1 processes times micro_batch 2 images; 12",
        ),
        (
            ["--recipe", "imagnet"],
            "there is no recipe 'imagnet': expected one of cluttered-digits, finetune-folder",
        ),
        (["--epochs", "two"], "epochs must be a whole number, got 'two'"),
        (["--model-args", "embed_dim"], "--model-args takes name=value, got 'embed_dim'"),
        (
            ["--img-size", "30"],
            "img_size must be a multiple of the patches' size, got 30 x 30 and 8 x 8 pixels",
        ),
        (["--compile"], "keep_rate_token_step, such as 8"),
        (["--distillation", "hard"], "needs a teacher"),
        (["--data", "/nowhere"], "/nowhere"),
        (["--val-split", ""], "val_split is empty: a run needs images to evaluate on"),
        (["--model", "resnet18", "--model-args", "--img-size", "none"], "ResNet is not supported"),
    ],
)
def test_bad_options(
    images: Path, tmp_path: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    output = ["--output", str(tmp_path / "run"), "--device", "cpu", "--data", str(images)]
    assert main(["train", *SHARED, *output, *options]) == 2
    # The last line: another may say that pretrained weights cannot be had.
    said = capsys.readouterr().err.splitlines()[-1]
    assert message in said and said.startswith("evit: error: ")
    assert not any(tmp_path.iterdir())


def test_unreadable_images(tmp_path: Path) -> None:
    data = image_data.write_folder(tmp_path / "data", train=12, val=3)
    bad = [data / "train" / "china" / "3.jpg", data / "val" / "flower" / "1.jpg"]
    bad[0].write_bytes(bad[0].read_bytes()[:300])
    bad[1].write_text("not an image")
    options = [*SHARED, "--data", str(data)]
    for _ in range(2):
        # The second time from the checkpoint before the first evaluation, which finds its image again.
        (tmp_path / "run" / "checkpoints" / "checkpoint-000000004.pth").unlink(missing_ok=True)
        text = runs.train(tmp_path / "run", options, 2)
        with (tmp_path / "run" / "unreadable.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert sorted(Path(row["path"]).name for row in rows) == ["1.jpg", "3.jpg"]
        assert "unreadable images     2" in text
    for limit, status in ((1, 1), (0, 1)):
        log = tmp_path / f"log{limit}"
        started = runs.start(tmp_path / f"run{limit}", [*options, "--max-unreadable", str(limit)], 2, log)
        assert runs.wait(started) == [status] * 2
        text = log.read_text()
        assert f"{limit + 1} images cannot be read, more than max_unreadable {limit}" in text
        assert "Traceback" not in text


DENSE = ["vit_tiny_patch16_224", "patch_size=8", "embed_dim=24", "depth=4", "num_heads=2"]
KINDS: dict[str, Any] = {
    "bfloat16": ["--precision", "bfloat16"],
    "float16": ["--precision", "float16"],
    "checkpointing": ["--grad-checkpointing"],
    "checkpointing in bfloat16": ["--grad-checkpointing", "--precision", "bfloat16"],
    "workers": ["--workers", "2"],
    "repeated": ["--repeated-aug", "3"],
    "compiled": [
        *("--compile", "--keep-rate-token-step", "8", "--keep-rate-end-epoch", "1", "--epochs", "1"),
        *("--model-args", *DENSE[1:3], "depth=2", "num_heads=2", "--drop-loc", "1"),
    ],
    "tome": ["--rule", "tome"],
    "tome by r": [
        *("--rule", "tome", "--rule-args", "r=3", "--keep-rate", "none", "--keep-rate-end-epoch", "0"),
    ],
    "oracle": ["--oracle", DENSE[0], "--oracle-args", *DENSE[1:], "--oracle-checkpoint", "WEIGHTS"],
    "distillation": [
        *("--distillation", "soft", "--teacher", DENSE[0], "--teacher-args", *DENSE[1:]),
        *("--teacher-checkpoint", "WEIGHTS"),
    ],
    "dynamicvit": [
        *("--model", "dynamicvit_tiny", "--model-args", *DENSE[1:3], "depth=4", "num_heads=2"),
        *("--drop-loc", "1", "2", "3", "--keep-rate", "0.7", "--keep-rate-end-epoch", "0"),
    ],
}


@pytest.mark.parametrize(("name", "options"), KINDS.items(), ids=KINDS.keys())
def test_kinds_of_runs(images: Path, alone: Path, tmp_path: Path, name: str, options: list[str]) -> None:
    weights = str(alone / "last.safetensors")
    options = [weights if option == "WEIGHTS" else option for option in options]
    # Those with a second model are the ones whose processes have more to agree on.
    processes = 2 if name in ("oracle", "distillation", "dynamicvit", "repeated") else 1
    text = runs.train(tmp_path / "run", [*SHARED, "--data", str(images), *options], processes)
    assert "top-1" in text
    losses = numbers(tmp_path / "run", "loss")
    if name == "compiled":
        assert "at most 2 keep rates" in text
        assert "recompile_limit" not in text
    elif name in ("workers", "checkpointing"):
        assert losses == pytest.approx(numbers(alone, "loss"), rel=2e-6)
    else:
        if name == "dynamicvit":
            assert set(numbers(tmp_path / "run", "keep_rate").values()) == {0.7}
        elif name == "tome by r":
            assert "keep rate none, as rule tome has r=3" in text and " GMACs, " in text
            summary = json.loads((tmp_path / "run/summary.json").read_text())
            assert summary["keep_rate"] is None and summary["gmacs"] < summary["gmacs_dense"]
        assert losses != pytest.approx(numbers(alone, "loss"), rel=1e-5)


def test_photographs_and_digits(tmp_path: Path) -> None:
    """The path that ImageNet takes: a folder of images of twelve classes, and the recipe from scratch."""
    data = image_data.write_photographs_and_digits(tmp_path / "data", train=40, val=10)
    options = [
        *("--recipe", "imagenet-300", "--data", str(data), "--img-size", "32", "--epochs", "12"),
        *("--model", "deit_tiny", "--model-args", "patch_size=8", "embed_dim=48", "depth=4", "num_heads=3"),
        *("--keep-rate-start-epoch", "2", "--keep-rate-end-epoch", "8", "--warmup-epochs", "1"),
        *(
            "--batch-size",
            "32",
            "--optimizer",
            "muon",
            "--lr",
            "1e-2",
            "--min-lr",
            "0",
            "--ema-decay",
            "0.95",
            "--eval-every",
            "6",
            "--workers",
            "1",
        ),
        # Small images of few classes bear less.
        *("--scale", "0.5", "1", "--hflip", "0", "--reprob", "0", "--auto-augment", "none"),
        *("--mixup", "0", "--cutmix", "0", "--drop-path", "0", "--repeated-aug", "0"),
    ]
    runs.train(tmp_path / "run", options)
    top1 = numbers(tmp_path / "run", "top1")
    assert top1["180", "val"] > 60  # of 12 classes


def test_a_picture_larger_than_allowed(images: Path, tmp_path: Path) -> None:
    data = image_data.write_folder(tmp_path / "data", train=12, val=3)
    path = data / "train" / "china" / "0.jpg"
    Image.new("RGB", (300, 300)).save(path)
    runs.train(tmp_path / "run", [*SHARED, "--data", str(data), "--max-image-pixels", "40000"])
    text = (tmp_path / "run" / "unreadable.csv").read_text()
    assert str(path) in text and "300x300 pixels, more than max_image_pixels 40000" in text
