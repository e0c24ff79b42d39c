"""The command evit visualize: what it writes, what it says of the weights, and what it refuses."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import evit_ext
from evit_ext import models
from evit_ext.cli import main
from evit_ext.training import RunCheckpoints, TrainConfig
from evit_ext.visualize import picture, view_images

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = ["--model", "deit_tiny", "--model-args", "depth=4", "--img-size", "64"]
RANDOM = [*SMALL, "--random-weights"]


def save_photo(path: Path, width: int = 90, height: int = 70, seed: int = 0) -> Path:
    noise = np.random.default_rng(seed).integers(0, 120, (height, width, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    return path


def build(num_classes: int = 3, seed: int = 3) -> Any:
    """The model of SMALL, with weights large enough that classes differ."""
    torch.manual_seed(seed)
    model: Any = models.deit_tiny(depth=4, img_size=64, num_classes=num_classes, drop_loc=None)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def data_of(path: Path) -> Any:
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', path.read_text("utf-8"))
    return json.loads(text)


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A run of three classes, whose moving average of the weights is another model."""
    folder = tmp_path / "run"
    config = TrainConfig(model="deit_tiny", model_args={"depth": 4}, img_size=64, keep_rate=0.6)
    folder.mkdir()
    (folder / "classes.txt").write_text("ant\nbee\ncow\n")
    config.save(folder / "config.yaml")
    weights = {"model": build(seed=4).state_dict(), "model_ema": build(seed=5).state_dict()}
    RunCheckpoints(folder / "checkpoints").save(weights, 20)
    return folder


def test_the_page_is_what_the_model_does(
    tmp_path: Path, run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photo, html = save_photo(tmp_path / "photo.png"), tmp_path / "new" / "page.html"
    assert (
        main(["visualize", str(photo), "--checkpoint", str(run_folder), "--last", "--html", str(html)]) == 0
    )
    captured = capsys.readouterr()
    assert f"{html}: photo.png, keep rate 0.9 0.8 0.7 0.6 0.5" in captured.out and not captured.err
    assert not (tmp_path / "evit.png").exists()
    data = data_of(html)
    assert (
        data["weights"] == f"{run_folder}/checkpoints, the last: step 20, moving average"
        and not data["warning"]
    )
    (found,) = data["photos"]
    # What DeiT's own preprocessing makes of it: 64 pixels after a crop.
    import timm.data

    model = build(seed=5)
    settings = timm.data.resolve_model_data_config(model, {"img_size": 64})
    with Image.open(photo) as image:
        seen = timm.data.create_transform(**settings)(image.convert("RGB"))
    (view,) = view_images(model, seen[None], [0.6])
    assert view.dense.probabilities is not None
    assert {best["name"] for best in found["best"]} == {"ant", "bee", "cow"}
    for best in found["best"]:
        expected = view.dense.probabilities[["ant", "bee", "cow"].index(best["name"])]
        assert best["probability"] == pytest.approx(float(expected), abs=2e-5)
    (rate,) = (entry for entry in found["rates"] if entry["rate"] == 0.6)
    for stage, entry in zip(view.rates[0].stages, rate["stages"], strict=True):
        assert [bit == "1" for bit in entry["kept"]] == stage.kept.flatten().tolist()
    plain = tmp_path / "plain.html"
    arguments = ["--checkpoint", str(run_folder), "--last", "--no-ema", "--html", str(plain)]
    assert main(["visualize", str(photo), *arguments]) == 0
    assert data_of(plain)["weights"].endswith("step 20")
    assert data_of(plain)["photos"][0]["best"] != found["best"]


def test_picture_and_default_name(
    tmp_path: Path, run_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    photo = save_photo(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    assert main(["visualize", str(photo), "--checkpoint", str(run_folder)]) == 0
    assert capsys.readouterr().out.startswith("evit.png: photo.jpg, keep rate 0.6\n")  # the run's own
    both = ["-o", "both.png", "--html", "both.html", "--keep-rate", "0.5", "0.7", "0.5"]
    assert main(["visualize", str(photo), "--checkpoint", str(run_folder), *both]) == 0
    with Image.open("evit.png") as one, Image.open("both.png") as two:
        assert one.format == "PNG" and two.height > one.height and two.width == one.width
    assert [rate["rate"] for rate in data_of(Path("both.html"))["photos"][0]["rates"]] == [0.5, 0.7]


def test_untrained_weights_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photo, html = save_photo(tmp_path / "a.png"), tmp_path / "page.html"
    output = tmp_path / "out.png"
    assert main(["visualize", str(photo), *RANDOM, "--html", str(html), "-o", str(output)]) == 0
    captured = capsys.readouterr()
    assert captured.err == "evit visualize: untrained weights: the patches mean nothing\n"
    assert data_of(html)["warning"] == "untrained weights: the patches mean nothing"
    assert (np.asarray(Image.open(output)) == (192, 42, 42)).all(axis=2).any()
    # 1000 classes are ImageNet's.
    assert not any(best["name"].startswith("class ") for best in data_of(html)["photos"][0]["best"])


def test_a_file_of_weights_and_of_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"model": build().state_dict()}, tmp_path / "evit.pth")
    (tmp_path / "names.txt").write_text("<b>x</b>\ny\nz\n", encoding="utf-8")
    photo, html = save_photo(tmp_path / "a.png"), tmp_path / "page.html"
    arguments = [*SMALL, "--num-classes", "3", "--checkpoint", str(tmp_path / "evit.pth")]
    assert main(["visualize", str(photo), *arguments, "--html", str(html)]) == 0
    assert not capsys.readouterr().err
    names = {best["name"] for best in data_of(html)["photos"][0]["best"]}
    assert names == {"class 0", "class 1", "class 2"}
    named = ["--classes", str(tmp_path / "names.txt")]
    assert main(["visualize", str(photo), *arguments, *named, "--html", str(html)]) == 0
    assert {best["name"] for best in data_of(html)["photos"][0]["best"]} == {"<b>x</b>", "y", "z"}


def test_weights_that_are_not_complete_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A DeiT's weights are enough to load a DynamicViT, but its predictors then are untrained."""
    torch.save(evit_ext.remove(models.deit_tiny(img_size=32)).state_dict(), tmp_path / "deit.pth")
    arguments = ["--model", "dynamicvit_tiny", "--img-size", "32", "--checkpoint", str(tmp_path / "deit.pth")]
    html = tmp_path / "page.html"
    assert main(["visualize", str(save_photo(tmp_path / "a.png")), *arguments, "--html", str(html)]) == 0
    assert "tensors of the weights are untrained, missing in the file" in capsys.readouterr().err
    assert "untrained" in data_of(html)["warning"]


def test_a_folder(tmp_path: Path, run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(4):
        save_photo(folder / f"{number}.png", seed=number)
    (folder / "bad.png").write_bytes(b"no image")
    (folder / "notes.txt").write_text("text")
    output, html = tmp_path / "sheet.png", tmp_path / "page.html"
    arguments = ["visualize", str(folder), "--checkpoint", str(run_folder), "--keep-rate", "0.5"]
    assert main([*arguments, "-o", str(output), "--html", str(html)]) == 0
    captured = capsys.readouterr()
    assert "1 file skipped, Pillow reads no .txt (notes.txt)" in captured.err
    assert f"{folder}/bad.png cannot be read and is left out: not an image" in captured.err
    assert f"{output}: 4 photographs" in captured.out
    assert [photo["name"] for photo in data_of(html)["photos"]] == ["0.png", "1.png", "2.png", "3.png"]
    assert main([*arguments, "-o", str(output), "--html", str(html), "--most", "2"]) == 0
    assert "there are 5 photographs; the first 2 are shown" in capsys.readouterr().err
    assert len(data_of(html)["photos"]) == 2


def test_the_way_up_that_the_camera_noted(tmp_path: Path, run_folder: Path) -> None:
    upright = save_photo(tmp_path / "upright.png", 64, 64)
    with Image.open(upright) as image:
        turned = image.transpose(Image.Transpose.ROTATE_90)
        exif = turned.getexif()
        exif[0x0112] = 6  # to be turned by 90 degrees clockwise
        turned.save(tmp_path / "turned.png", exif=exif)
    found = []
    for name in ("upright", "turned"):
        html = tmp_path / f"{name}.html"
        arguments = ["--checkpoint", str(run_folder), "--html", str(html)]
        assert main(["visualize", str(tmp_path / f"{name}.png"), *arguments]) == 0
        found.append(data_of(html)["photos"][0]["source"])
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.jpg", *SMALL], "there is no file or folder nowhere.jpg"),
        (["text.jpg", *RANDOM], "text.jpg cannot be read: not an image that Pillow knows"),
        (["photo.png", "text.jpg", *RANDOM, "--max-image-pixels", "9"], "none of 2 photographs could"),
        (["photo.png", "--model", "deit_smal", "--random-weights"], "nearest names are deit_small"),
        (["photo.png", "--model", "vit_smal_patch16_224", "--pretrained"], "names are vit_small_patch16_224"),
        (["photo.png", "--model", "resnet18", "--random-weights"], "ResNet is not supported"),
        (["photo.png", *RANDOM, "--keep-rate", "0.7", "1.5"], "keep_rate must be in (0, 1], got 1.5"),
        (["photo.png", *RANDOM, "--keep-rate", "nan"], "keep_rate must be in (0, 1], got nan"),
        (["photo.png"], "expected a run's folder, or a model with one of --checkpoint FILE"),
        (["photo.png", *SMALL, "--checkpoint", "nowhere.pth"], "there is no file nowhere.pth"),
        (["photo.png", "--checkpoint", "empty"], "empty is a folder: expected a file of weights"),
        (["photo.png", *SMALL, "--checkpoint", "x", "--pretrained"], "got more than one of these"),
        (["photo.png", *RANDOM, "--ema"], "--ema and --no-ema are for the weights of a run"),
        (["photo.png", *SMALL, "-o", "out.txt"], "the picture must be a .png, .jpg, .jpeg, .webp file"),
        (["photo.png", *SMALL, "--html", "empty"], "empty is a folder: give the file to write"),
        (["empty", *SMALL], "the folder empty has no image files"),
        (["photo.png", *RANDOM, "--classes", "text.jpg"], "each of 1000 classes, got 1 names"),
        (["photo.png", *SMALL, "--most", "0"], "expected --most of at least 1, got 0"),
        (["photo.png", *SMALL[:-1], "10", "--random-weights"], "10"),
    ],
)  # fmt: skip
def test_bad_input(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    save_photo(tmp_path / "photo.png")
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "empty").mkdir()
    assert main(["visualize", *arguments]) == 2
    captured = capsys.readouterr()
    *notes, error = captured.err.splitlines()
    assert error.startswith("evit: error: ") and message in error
    assert "Traceback" not in captured.err and all(note.startswith("evit visualize: ") for note in notes)
    assert not captured.out and not (tmp_path / "evit.png").exists()


def test_a_run_of_another_size(tmp_path: Path, run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line, however many tensors do not fit."""
    photo = save_photo(tmp_path / "a.png")
    assert main(["visualize", str(photo), "--checkpoint", str(run_folder), "--model-args", "depth=6"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and len(error) < 800
    assert f"the weights of {run_folder} do not fit" in error and "Missing key(s)" in error
    assert main(["visualize", str(photo), "--checkpoint", str(run_folder), "--num-classes", "2"]) == 2
    assert "size mismatch for head.weight" in (error := capsys.readouterr().err) and "(and 1 more)" in error


def test_verbose_says_where(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--verbose", "info", "nothing"], ["info", "nothing", "--verbose"]):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("Traceback") and "evit: error: there is no model 'nothing'" in error


def test_a_missing_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def font(size: int) -> None:
        raise ModuleNotFoundError('pictures need Pillow 10.1 or newer: pip install "evit_ext[viz]"')

    monkeypatch.setattr(picture, "font", font)
    assert (
        main(["visualize", str(save_photo(tmp_path / "a.png")), *SMALL, "-o", str(tmp_path / "o.png")]) == 2
    )
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("command", ["train", "eval", "visualize", "benchmark", "info"])
def test_help_has_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([command, "--help"], ["--help"]):
        with pytest.raises(SystemExit) as exit_:
            main(arguments)
        assert exit_.value.code == 0
        out = " ".join(capsys.readouterr().out.split())  # lines are broken anywhere
        assert "xample" in out and f"evit {command} " in out.partition("xample")[2]
    assert "--verbose" in out


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere files have no such names")
def test_names_that_are_no_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photo = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.png"))
    save_photo(photo)
    page = tmp_path / "page.html"
    assert main(["visualize", str(photo), *RANDOM, "--html", str(page)]) == 0
    assert data_of(page)["photos"][0]["name"] == "\\xff.png"
    assert "\\xff.png" in capsys.readouterr().out
