"""Which weights of a run are taken, and what is said about them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from evit_ext._util.safetensors_bytes import to_bytes
from evit_ext.cli.runs import file_classes, run_classes, run_of, run_weights
from evit_ext.training import RunCheckpoints


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run whose best weights are 1, of its moving average, and whose last are 2 and 3."""
    facts = {"weights": "ema", "epoch": "7", "top1": "67.500", "classes": '["a", "b"]'}
    (tmp_path / "config.yaml").touch()
    (tmp_path / "best.safetensors").write_bytes(to_bytes({"x": torch.ones(1)}, facts))
    state = {"model": {"x": 2 * torch.ones(1)}, "model_ema": {"x": 3 * torch.ones(1)}}
    RunCheckpoints(tmp_path / "checkpoints").save(state, 20)
    return tmp_path


def test_the_best_by_default(folder: Path) -> None:
    weights, words = run_weights(str(folder), last=False, ema=None)
    assert weights["x"] == 1
    assert words == f"{folder}/best.safetensors, the best: epoch 7, top-1 67.50 %, moving average"
    assert run_weights(str(folder), last=False, ema=True)[0]["x"] == 1
    with pytest.raises(ValueError, match="are of the moving average: leave out --ema.* or add --last"):
        run_weights(str(folder), last=False, ema=False)


def test_the_last_if_asked_for_or_if_there_are_no_best(folder: Path) -> None:
    assert run_weights(str(folder), last=True, ema=None)[0]["x"] == 3
    weights, words = run_weights(str(folder), last=True, ema=False)
    assert weights["x"] == 2 and words == f"{folder}/checkpoints, the last: step 20"
    (folder / "best.safetensors").unlink()
    weights, words = run_weights(str(folder), last=False, ema=None)
    assert weights["x"] == 3 and "the run was not evaluated yet" in words


def test_the_run_of_a_file(folder: Path) -> None:
    assert run_of(str(folder)) == run_of(str(folder / "best.safetensors")) == str(folder)
    assert run_of(str(folder / "checkpoints" / "checkpoint-000000020.pth")) == str(folder)
    assert run_of(str(folder.parent.parent / "elsewhere.pth")) is None


def test_classes_keep_their_spaces(folder: Path) -> None:
    """They are names of folders, which data is matched by."""
    (folder / "classes.txt").write_text(" a\nb \n")
    assert run_classes(str(folder)) == [" a", "b "]


def test_the_classes_of_a_file(folder: Path) -> None:
    assert file_classes(str(folder / "best.safetensors")) == ["a", "b"]
    assert file_classes(str(folder / "checkpoints" / "checkpoint-000000020.pth")) is None
    assert file_classes(str(folder / "nowhere")) is None
