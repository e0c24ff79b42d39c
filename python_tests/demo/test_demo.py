"""The whole demo, in its quick form: what it writes, and what it says to bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import evit_ext
from evit_ext.data import ClutteredDigits
from evit_ext.demo import FULL, QUICK, pipeline
from evit_ext.demo.__main__ import main
from evit_ext.demo.network import build_deit
from evit_ext.training import choose_precision, evaluate


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The output folder and the log of ``python -m evit_ext.demo --quick``."""
    output = tmp_path_factory.mktemp("demo") / "new" / "folder"
    command = [sys.executable, "-m", "evit_ext.demo", "--quick", "--seed", "3", "--precision", "float32"]
    done = subprocess.run([*command, "--output", str(output)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return output, done.stdout


@pytest.fixture(scope="module")
def rows(run: tuple[Path, str]) -> list[dict[str, Any]]:
    rows = json.loads((run[0] / "metrics.json").read_text())
    assert isinstance(rows, list)
    return rows


def test_rows(rows: list[dict[str, Any]]) -> None:
    assert [(row["model"], row["keep_rate"]) for row in rows] == [("DeiT", 1.0), ("EViT", 0.7), ("EViT", 0.5)]
    for row in rows:
        assert 0 <= row["top1"] <= 100
        assert row["images_per_second"] > 0
        assert len(row["object_patches_kept"]) == len(row["object_patches_kept_at_random"])
    assert rows[0]["gmacs"] > rows[1]["gmacs"] > rows[2]["gmacs"] > 0
    assert rows[0]["speedup"] == 1
    # 16 patches: 12 are kept of them, 10 of 13, 8 of 11.
    assert rows[1]["object_patches_kept_at_random"] == pytest.approx(
        [12 / 16, 12 / 16 * 10 / 13, 12 / 16 * 10 / 13 * 8 / 11], abs=1e-4
    )
    for row in rows[1:]:
        assert row["object_patches_kept"] == sorted(row["object_patches_kept"], reverse=True)


def test_checkpoints_give_the_accuracy_of_the_table(
    run: tuple[Path, str], rows: list[dict[str, Any]]
) -> None:
    test = ClutteredDigits("test", QUICK.canvas_size, QUICK.test_images, pipeline._TEST_SEED)
    for row, name in zip(rows, ("deit", "evit_0.7", "evit_0.5"), strict=True):
        model = build_deit(QUICK.canvas_size, QUICK.patch_size, QUICK.embed_dim, QUICK.depth, QUICK.num_heads)
        model.load_state_dict(load_file(run[0] / f"{name}.safetensors"))
        if row["keep_rate"] < 1:
            evit_ext.apply(model, keep_rate=row["keep_rate"])
        result = evaluate(model, test.batches(250), choose_precision("cpu", "float32"))
        assert result.top1 == pytest.approx(row["top1"])


def test_picture(run: tuple[Path, str]) -> None:
    with Image.open(run[0] / "tokens.png") as image:
        assert image.format == "PNG"
        assert image.width > 800
        assert image.height > 400


def test_log(run: tuple[Path, str], rows: list[dict[str, Any]]) -> None:
    log = run[1]
    for part in (
        "precision: float32 (as asked)",
        "DeiT epoch 2/2: 4/4",
        "keep 0.70",
        "speed-up",
        "before",
    ):
        assert part in log
    assert f"{rows[2]['top1']:.1f}" in log


def test_same_seed_same_results(run: tuple[Path, str], rows: list[dict[str, Any]], tmp_path: Path) -> None:
    assert main(["--quick", "--seed", "3", "--precision", "float32", "--output", str(tmp_path)]) == 0
    again = json.loads((tmp_path / "metrics.json").read_text())
    for ours, theirs in zip(again, rows, strict=True):
        for key in ("top1", "gmacs", "object_patches_kept"):
            assert ours[key] == theirs[key]
    for file in ("deit", "evit_0.5"):
        first, second = (load_file(folder / f"{file}.safetensors") for folder in (run[0], tmp_path))
        assert all(torch.equal(first[key], second[key]) for key in first)


def test_pictured_images_show_different_digits() -> None:
    test = ClutteredDigits("test", FULL.canvas_size, FULL.test_images, pipeline._TEST_SEED)
    indices = pipeline._pictured(test, 12)
    assert test.render(indices).labels.tolist() == [*range(10), 0, 1]
    assert len(set(indices)) == 12


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seed", "one"], "invalid int value: 'one'"),
        (["--difficulty", "impossible"], "invalid choice: 'impossible'"),
        (["--precision", "float16"], "invalid choice: 'float16'"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_bad_number_of_epochs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--quick", "--epochs", "0", "--output", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "python -m evit_ext.demo: error: epochs must be at least 1, got 0\n"


def test_output_that_is_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "file"
    path.touch()
    assert main(["--quick", "--output", str(path)]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert str(path) in err


@pytest.mark.parametrize(("package", "name"), [("sklearn", "scikit-learn"), ("matplotlib", "matplotlib")])
def test_missing_package(
    package: str,
    name: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pipeline, "find_spec", lambda wanted: None if wanted == package else object())
    assert main(["--quick", "--output", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert err == f'python -m evit_ext.demo: error: the demo needs {name}: pip install "evit_ext[demo]"\n'
