"""The summary of a run: its table and its file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from evit_ext.training.evaluation import Evaluation
from evit_ext.training.run.summary import RunSummary, Score, better

SUMMARY = RunSummary(
    model="deit_small",
    parameters=22_050_664,
    keep_rate=0.7,
    gmacs=3.0294,
    gmacs_dense=4.5979,
    best=Score(epoch=8, top1=79.5, top5=94.75, loss=0.91234),
    last=Score(epoch=10, top1=79.25, top5=94.5, loss=0.925),
    best_ema=Score(epoch=10, top1=79.75, top5=94.875, loss=0.9),
    epochs=10,
    steps=12_510,
    images=12_810_240,
    processes=8,
    seconds=3723.4,
    images_per_second=3456.7,
    peak_memory=3 * 2**29,
    unreadable=2,
    checkpoints="runs/a/checkpoints",
)


def test_table() -> None:
    assert str(SUMMARY).splitlines() == [
        "model                 deit_small, 22.05 M parameters",
        "cost                  3.03 GMACs at keep rate 0.7, 4.6 dense",
        "best                  top-1 79.50 %, top-5 94.75 %, loss 0.9123 (epoch 8)",
        "last                  top-1 79.25 %, top-5 94.50 %, loss 0.9250 (epoch 10)",
        "best, moving average  top-1 79.75 %, top-5 94.88 %, loss 0.9000 (epoch 10)",
        "trained               10 epochs, 12,510 steps, 12,810,240 images, 8 processes",
        "time                  1:02:03, 3457 images/s",
        "peak memory           1.50 GiB",
        "unreadable images     2, see unreadable.csv",
        "checkpoints           runs/a/checkpoints",
    ]


def test_what_there_is_not_has_no_line() -> None:
    text = str(replace(SUMMARY, best=None, last=None, best_ema=None, peak_memory=None, processes=1))
    assert "top-1" not in text and "memory" not in text and "1 process\n" in text


def test_file(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    path.write_text("old")
    replace(SUMMARY, last=Score(epoch=10, top1=1.0, top5=5.0, loss=float("nan"))).save(path)
    read = json.loads(path.read_text())
    assert read["best"] == {"epoch": 8, "top1": 79.5, "top5": 94.75, "loss": 0.91234}
    assert read["last"]["loss"] is None and read["last_ema"] is None
    assert (read["images"], read["seconds"], read["gmacs"]) == (12_810_240, 3723.4, 3.0294)
    assert list(tmp_path.iterdir()) == [path]


def test_best() -> None:
    evaluation = Evaluation(
        top1=50.0,
        top5=75.0,
        loss=1.5,
        images=4,
        images_per_second=1.0,
        tokens_kept=1.0,
        tokens_kept_by_stage=(),
        unreadable=(),
    )
    first, second = Score.of(evaluation, 0), Score.of(replace(evaluation, loss=2.0), 1)
    assert better(None, first) == better(first, second) == first
    assert first == Score(epoch=0, top1=50.0, top5=75.0, loss=1.5)
    assert better(first, replace(second, top1=51.0)).epoch == 1


def test_of_equal_accuracies_the_lower_loss_is_better() -> None:
    first, second, third = (
        Score(epoch=epoch, top1=90.0, top5=100.0, loss=loss) for epoch, loss in ((1, 0.5), (2, 0.3), (3, 0.3))
    )
    assert better(None, first) is first
    assert better(first, second) is second
    assert better(second, third) is second  # the earlier one
    assert better(second, Score(epoch=4, top1=90.0, top5=100.0, loss=float("nan"))) is second
    assert better(second, Score(epoch=5, top1=91.0, top5=100.0, loss=9.0)).epoch == 5
