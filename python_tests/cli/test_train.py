"""``evit train``: the first hour with photographs of one's own, and what it says when something is wrong."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import runs
import yaml
from image_data import write_folder
from PIL import Image
from safetensors import safe_open

from evit_ext.cli import main
from evit_ext.training import hub
from evit_ext.training.config import load_config

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = [
    "--model", "vit_tiny_patch16_224", "--img-size", "32",
    "--model-args", "patch_size=8", "embed_dim=24", "depth=4", "num_heads=2",
    "--precision", "float32", "--device", "cpu", "--workers", "0",
]  # fmt: skip


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders without splits, with what people have in them."""
    root = write_folder(tmp_path_factory.mktemp("photos") / "data", train=12, val=1) / "train"
    for path in sorted((root / "china").iterdir())[:4]:
        Image.open(path).save(path.with_suffix(".webp"))
        path.unlink()
    (root / "china" / "notes.txt").write_text("Peking")
    (root / "flower" / ".DS_Store").write_bytes(b"")
    return root


@pytest.fixture(scope="module")
def run(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run with what was printed."""
    folder = tmp_path_factory.mktemp("runs") / "photos"
    text = runs.train(folder, [*TINY, "--data", str(photos), "--epochs", "2", "--no-pretrained"])
    return folder, text


def test_it_simply_works(run: tuple[Path, str], photos: Path) -> None:
    folder, said = run
    config = load_config(folder / "config.yaml")
    assert (config.batch_size, config.epochs, config.warmup_epochs) == (2, 2, 0.2)
    assert config.lr == 8.8e-5 and config.data == str(photos) and not config.pretrained
    assert "20 images an epoch, 4 to evaluate on; 10 steps of 1 x 1 x 2 images" in said
    assert "rate 8.8e-05 at batch size 2, falling to 8.8e-07 over 2 epochs, warm-up 0.2; adamw" in said
    assert "keep rate 0.7; weights at the start: random" in said and "crops of 0.5 to 1 of the area" in said
    assert "4 of 24 images, 20 % of each class, are held out of training for it" in said
    assert "1 file skipped, Pillow reads no .txt (china/notes.txt)" in said
    assert "1 file skipped, hidden (flower/.DS_Store)" in said
    assert "top-5" not in said  # of two classes
    _, _, after = said.partition("\nnext:\n")
    assert [line.split()[:3] for line in after.splitlines()] == [
        ["evit", verb, {"visualize": "PHOTO"}.get(verb, str(folder))]
        for verb in ("report", "eval", "visualize", "export")
    ]


def test_a_run_knows_its_classes(run: tuple[Path, str]) -> None:
    folder, _ = run
    assert (folder / "classes.txt").read_text() == "china\nflower\n"
    for name in ("best", "last"):
        with safe_open(str(folder / f"{name}.safetensors"), "pt") as file:
            assert json.loads(file.metadata()["classes"]) == ["china", "flower"]


def test_a_run_goes_on_only_with_its_classes(
    run: tuple[Path, str], photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run[0], tmp_path / "run")
    data = tmp_path / "photos"
    shutil.copytree(photos, data)
    (data / "flower").rename(data / "rose")
    command = ["train", *TINY, "--data", str(data), "--epochs", "2", "--no-pretrained"]
    assert main([*command, "-o", str(tmp_path / "run")]) == 2
    assert "the data now differs in +rose, -flower: choose another folder" in capsys.readouterr().err


@pytest.mark.parametrize("renamed", [False, True])
def test_data_meets_a_model_by_name(
    run: tuple[Path, str], photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], renamed: bool
) -> None:
    """Images of one class only are right or wrong as before; by number, they would be another's."""
    data = tmp_path / "test"
    shutil.copytree(photos / "flower", data / ("roses" if renamed else "flower"))
    arguments = ["eval", str(run[0]), "--data", str(data), "--json", "--repeats", "0", "--device", "cpu"]
    if renamed:
        assert main(arguments) == 2
        said = capsys.readouterr().err
        assert (
            f"has the class roses, which {run[0]} does not know; it knows the classes china, flower" in said
        )
        return
    assert main(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["rows"][0]["images"] == 12  # all of it: nothing of another folder was trained on
    assert any("no image of the class china" in note for note in found["notes"])
    (data / "china").mkdir()  # an empty folder is no class, and does not shift the others
    assert main(arguments) == 0
    assert json.loads(capsys.readouterr().out)["rows"][0]["top1"] == found["rows"][0]["top1"]


def test_the_held_out_part_is_evaluated_from_anywhere(
    run: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    common = ["--json", "--repeats", "0", "--device", "cpu"]
    output = tmp_path / "new" / "figures.json"
    output.parent.mkdir()
    assert main(["eval", str(run[0]), *common, "-o", str(output)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert json.loads(output.read_text()) == found
    summary = json.loads((run[0] / "summary.json").read_text())
    assert found["rows"][0]["images"] == 4
    assert found["rows"][0]["top1"] == summary["best"]["top1"]
    assert found["weights"].startswith(
        f"{run[0]}/best.safetensors, the best: epoch {summary['best']['epoch']}"
    )
    # The settings of the run come with any of its files.
    for checkpoint in ("last.safetensors", "checkpoints/checkpoint-000000020.pth"):
        for named in ([str(run[0])], []):
            assert main(["eval", *named, "--checkpoint", str(run[0] / checkpoint), *common]) == 0
            found = json.loads(capsys.readouterr().out)
            assert checkpoint in found["weights"]
            assert found["rows"][0]["loss"] == pytest.approx(summary["last"]["loss"], rel=1e-5)


def test_an_export_knows_its_classes(run: tuple[Path, str], tmp_path: Path) -> None:
    from evit_ext.export import read_metadata

    assert main(["export", str(run[0]), "-o", str(tmp_path / "a.pt2")]) == 0
    assert list(read_metadata(tmp_path / "a.pt2").classes or ()) == ["china", "flower"]


def test_a_benchmark_of_a_run(
    run: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--batch-size", "1", "--seconds", "0.1", "--latency-calls", "5", "--precision", "float32"]
    assert main(["benchmark", str(run[0]), *options, "--json", "--device", "cpu"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["keep_rate"] for row in rows] == [1.0, 0.7] and rows[0]["gmacs"] < 0.01
    # As the run reduces tokens, in one block only and at random.
    other = tmp_path / "run"
    other.mkdir()
    shutil.copy(run[0] / "classes.txt", other)
    settings = yaml.safe_load((run[0] / "config.yaml").read_text())
    (other / "config.yaml").write_text(yaml.safe_dump({**settings, "drop_loc": [3], "rule": "random"}))
    assert main(["benchmark", str(other), *options, "--json", "--device", "cpu"]) == 0
    last = json.loads(capsys.readouterr().out)["rows"]
    assert rows[1]["gmacs"] < last[1]["gmacs"] < rows[0]["gmacs"] and "andom" in last[1]["model"]


def test_all_that_is_wrong_is_said_at_once(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    wrong = ["--model", "deit_smal", "--lr", "-1", "--mixup", "-2", "--initial-checkpoint", "none.pth"]
    assert main(["train", "--data", "photoss", *wrong, "-o", "runs/a"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "evit: error: 5 things are wrong:" and len(lines) == 6
    for part in (
        "'deit_smal'",
        "lr must not",
        "mixup must",
        "there is no photoss in",
        "there is no none.pth",
    ):
        assert sum(part in line for line in lines) == 1
    sizes = ["--batch-size", "21", "--num-classes", "1", "--no-pretrained"]
    assert main(["train", "--data", str(photos), *sizes]) == 2
    said = capsys.readouterr().err
    assert "20 images, fewer than the 21 of one batch" in said and "the data has 2 classes" in said
    for fields in ({"learning_rate": 1, "epoch": 2}, {"lr": "fast", "epochs": 1.5}):
        Path("recipe.yaml").write_text(yaml.safe_dump(fields))
        assert main(["train", "--recipe", "recipe.yaml"]) == 2
        said = capsys.readouterr().err
        assert said.startswith("evit: error: 2 things are wrong") and said.count("recipe.yaml") == 2
    assert not Path("runs").exists()


def test_pretrained_weights_that_cannot_be_had(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(hub, "_unreachable", lambda cfg, patience: "no answer within 5 s")
    command = ["train", "--data", str(photos), "--model", "deit_tiny", "-o", str(tmp_path / "run")]
    assert main([*command, "--pretrained"]) == 2
    said = capsys.readouterr().err
    assert "weights of deit_tiny cannot be had (no answer within 5 s)" in said and "--no-pretrained" in said
    assert main(["train", "--recipe", "imagenet-finetune-30", *command[1:], "--batch-size", "4"]) == 2
    assert "weights of deit_tiny cannot be had (no answer within 5 s)" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_one_class_is_no_training(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(photos, tmp_path / "data" / "all")
    assert main(["train", "--data", str(tmp_path / "data"), "--no-pretrained"]) == 2
    assert "has one class only, all: expected a folder for each of two" in capsys.readouterr().err


def test_names_that_no_file_can_hold(tmp_path: Path) -> None:
    """GBK names of a class folder and of a damaged image end neither the run nor its repetition."""
    data = write_folder(tmp_path / "data", train=6, val=2) / "train"
    odd = os.fsdecode(os.fsencode(data) + b"/\xd5\xd5")
    (data / "flower").rename(odd)
    Path(os.fsdecode(os.fsencode(odd) + b"/\xc4\xe3.jpg")).write_bytes(b"no image")
    shutil.rmtree(tmp_path / "data" / "val")
    folder = tmp_path / "run"
    options = [*TINY, "--data", str(data), "--epochs", "2", "--no-pretrained", "--val-fraction", "0.3"]
    for _ in range(2):  # the second time it goes on, from its end
        said = runs.train(folder, options)
        assert "Traceback" not in said
    assert (
        "\\xd5\\xd5/\\xc4\\xe3.jpg,not an image that Pillow knows" in (folder / "unreadable.csv").read_text()
    )
    assert (folder / "classes.txt").read_text() == "\\xd5\\xd5\nchina\n"


def test_a_stream_that_cannot_show_a_letter(tmp_path: Path) -> None:
    import subprocess
    import sys

    (tmp_path / "写真.jpg").write_bytes(b"no image")
    command = [
        sys.executable,
        "-m",
        "evit_ext",
        "visualize",
        "写真.jpg",
        "--model",
        "deit_tiny",
        "--random-weights",
    ]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip() == (
        "evit: error: \\u5199\\u771f.jpg cannot be read: not an image that Pillow knows"
    )


def test_weights_and_biases(run: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the package, which is asked for and not installed."""
    import sys
    from types import SimpleNamespace

    from evit_ext.training.run.metrics import Metrics

    logged: list[Any] = []
    there = SimpleNamespace(
        log=lambda values, step: logged.append((step, values)), finish=lambda: logged.append("end")
    )
    given: dict[str, Any] = {}
    monkeypatch.setitem(
        sys.modules, "wandb", SimpleNamespace(init=lambda **more: given.update(more) or there)
    )
    with Metrics(tmp_path / "run", tensorboard=False, wandb="project") as metrics:
        metrics.write(3, 1, "train", loss=0.5)
    assert given["project"] == "project" and given["name"] == "run" and given["resume"] == "allow"
    assert logged == [(3, {"train/loss": 0.5}), "end"]
    first = given["id"]
    Metrics(tmp_path / "run", tensorboard=False, wandb="project", resume_step=3).close()
    assert given["id"] == first  # it goes on
    for other in ("run", "other/run"):
        Metrics(tmp_path / other, tensorboard=False, wandb="project").close()
        assert given["id"] != first
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(RuntimeError, match="pip install wandb, or leave out --wandb"):
        Metrics(tmp_path / "run", tensorboard=False, wandb="project")
