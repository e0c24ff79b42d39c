"""Metrics: what is in the file, also after a run was killed, and in TensorBoard's events."""

from __future__ import annotations

import csv
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from evit_ext.training.run.metrics import FIGURES, Metrics

HEADER = "step,epoch,kind," + ",".join(FIGURES)


def records(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def steps(folder: Path) -> list[tuple[str, str]]:
    return [(record["step"], record["kind"]) for record in records(folder)]


def test_numbers_are_read_as_they_were(tmp_path: Path) -> None:
    with Metrics(tmp_path, tensorboard=False) as metrics:
        metrics.write(50, 0, "train", loss=torch.tensor(0.1), lr=1e-3 / 3, memory=2**33 + 1, grad_norm=None)
        metrics.write(50, 0, "val", loss=float("nan"), top1=76.5)
    train, val = records(tmp_path)
    assert float(train["loss"]) == torch.tensor(0.1).item()
    assert float(train["lr"]) == 1e-3 / 3
    assert train["memory"] == str(2**33 + 1)
    assert train["grad_norm"] == train["top5"] == ""
    assert (val["loss"], val["top1"], val["kind"], val["epoch"]) == ("nan", "76.5", "val", "0")
    text = (tmp_path / "metrics.csv").read_bytes()
    assert text.startswith(HEADER.encode() + b"\n50,0,train,0.10000000149011612,")
    assert b"\r" not in text and text.endswith(b"\n")


def test_every_line_is_there_at_once(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, tensorboard=False)
    for step in (1, 2):
        metrics.write(step, 0, "train", loss=1.0)
        assert len(records(tmp_path)) == step
    metrics.close()


@pytest.mark.parametrize(
    "rest", ["40,1,tra", "40,1,train,1.0\n", "\0\0\0", "\0\n", "x,1,train" + "," * 10 + "\n"]
)
def test_a_killed_run_that_goes_on_has_each_step_once(tmp_path: Path, rest: str) -> None:
    with Metrics(tmp_path, tensorboard=False) as metrics:
        for step in (10, 20, 30):
            metrics.write(step, step // 20, "train", loss=float(step))
        metrics.write(20, 1, "val", top1=1.0)
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write(rest)
    with Metrics(tmp_path, tensorboard=False, resume_step=20) as metrics:
        metrics.write(20, 1, "val", top1=2.0)  # evaluated once more
        metrics.write(20, 1, "ema", top1=3.0)
        metrics.write(30, 1, "train", loss=31.0)
    assert steps(tmp_path) == [
        ("10", "train"), ("20", "train"), ("20", "val"), ("20", "ema"), ("30", "train"),
    ]  # fmt: skip
    assert [record["top1"] for record in records(tmp_path)] == ["", "", "1.0", "3.0", ""]
    assert [record["loss"] for record in records(tmp_path)][-1] == "31.0"


def test_a_run_that_begins_anew(tmp_path: Path) -> None:
    for resume_step in (None, 0):
        with Metrics(tmp_path, tensorboard=False, resume_step=resume_step) as metrics:
            assert steps(tmp_path) == []
            metrics.write(1, 0, "train")
    (tmp_path / "metrics.csv").write_text("ste")  # killed at the very beginning
    with Metrics(tmp_path, tensorboard=False, resume_step=5) as metrics:
        metrics.write(6, 0, "train")
    assert steps(tmp_path) == [("6", "train")]


def test_events(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

    def scalars(tag: str) -> list[tuple[int, float]]:
        events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
        events.Reload()
        return [(event.step, event.value) for event in events.Scalars(tag)]

    with Metrics(tmp_path) as metrics:
        for step in (10, 20, 30):
            metrics.write(step, 0, "train", loss=1.0 * step)
        assert scalars("train/loss") == [(10, 10.0), (20, 20.0), (30, 30.0)]
    with Metrics(tmp_path, tensorboard=True, resume_step=20) as metrics:
        metrics.write(30, 0, "train", loss=31.0)
        metrics.write(30, 0, "val", top1=50.0)
    assert scalars("train/loss") == [(10, 10.0), (20, 20.0), (30, 31.0)]
    assert scalars("val/top1") == [(30, 50.0)]


def test_without_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with Metrics(tmp_path) as metrics:
        metrics.write(1, 0, "train", loss=1.0)
    assert steps(tmp_path) == [("1", "train")] and not (tmp_path / "tensorboard").exists()
    with pytest.raises(RuntimeError, match=r'pip install "evit_ext\[train\]"'):
        Metrics(tmp_path / "new", tensorboard=True)
    assert not (tmp_path / "new").exists()


def test_a_full_disk(tmp_path: Path) -> None:
    with Metrics(tmp_path, tensorboard=False) as metrics:
        full = open("/dev/full", "a", newline="")  # noqa: SIM115  # closing it fails, too
        metrics._file = full
        with pytest.raises(OSError, match="No space left on device: '.*metrics.csv'"):
            metrics.write(1, 0, "train", loss=1.0)
        metrics._file = None
        with pytest.raises(OSError):
            full.close()


def test_lines_are_brought_to_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Metrics(tmp_path, tensorboard=False) as metrics:
        synced: list[int] = []
        monkeypatch.setattr(os, "fsync", synced.append)
        metrics.write(1, 0, "train", loss=1.0)
        metrics.sync()
        assert synced == [metrics._file.fileno()]
    Metrics(tmp_path, enabled=False).sync()


def test_other_processes_write_nothing(tmp_path: Path) -> None:
    with Metrics(tmp_path / "run", enabled=False) as metrics:
        metrics.write(1, 0, "train", loss=1.0)
    assert not (tmp_path / "run").exists()


def test_errors(tmp_path: Path) -> None:
    wanted: Any = "yes"
    with pytest.raises(ValueError, match="tensorboard must be True, False or 'auto', got 'yes'"):
        Metrics(tmp_path, tensorboard=wanted)
    with Metrics(tmp_path, tensorboard=False) as metrics:
        with pytest.raises(ValueError, match="kind must be one of train, epoch, val, ema, got 'test'"):
            metrics.write(1, 0, "test")
        with pytest.raises(ValueError, match="figures are loss, .*, got accuracy"):
            metrics.write(1, 0, "train", accuracy=1.0)
    (tmp_path / "metrics.csv").write_text("step,loss\n1,2.0\n")
    with pytest.raises(ValueError, match="has the columns step,loss, expected step,epoch,kind,"):
        Metrics(tmp_path, tensorboard=False, resume_step=1)
    assert (tmp_path / "metrics.csv").read_text() == "step,loss\n1,2.0\n"
