"""The summary at the end of a run: a table to read, and the same figures as JSON."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from evit_ext._util.files import replacing
from evit_ext.training.evaluation import Evaluation


@dataclass(frozen=True, kw_only=True)
class Score:
    """An evaluation during a run.

    Attributes:
        epoch: the epoch after which it was made, from 1.
        top1, top5: in percent.
        loss: mean cross-entropy, in nats.
    """

    epoch: int
    top1: float
    top5: float
    loss: float

    @classmethod
    def of(cls, evaluation: Evaluation, epoch: int) -> Score:
        """Return the figures of an evaluation that the summary has."""
        return cls(epoch=epoch, top1=evaluation.top1, top5=evaluation.top5, loss=evaluation.loss)


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """The figures of a run; ``str`` of it is a table.

    Attributes:
        model: its name.
        parameters: how many it has.
        keep_rate: at the end of the run; 1 for a model that drops nothing.
        gmacs: multiply-accumulates of one image at that keep rate, in 10^9.
        gmacs_dense: the same when every token is kept.
        best, last: evaluations of the model: the one with the highest top-1 at the last keep rate, and the
            one at the end. None if there was none.
        best_ema, last_ema: the same for the moving average of the weights; None if there is none.
        epochs, steps: done in all.
        images: seen in training, counted each time.
        processes: how many trained together.
        seconds: that the run took, including the time before it was resumed.
        images_per_second: of training, without evaluation; of all processes together.
        peak_memory: of the first process, on its GPU or else in main memory, in bytes; None if not measured.
        unreadable: number of images that could not be read.
        checkpoints: their folder.
        classes: how many the model tells apart; top-5 is not shown of five or fewer.
    """

    model: str
    parameters: int
    keep_rate: float | None
    gmacs: float
    gmacs_dense: float
    best: Score | None
    last: Score | None
    best_ema: Score | None = None
    last_ema: Score | None = None
    epochs: int
    steps: int
    images: int
    processes: int
    seconds: float
    images_per_second: float
    peak_memory: int | None
    unreadable: int
    checkpoints: str
    classes: int = 1000

    def __str__(self) -> str:
        """Return the table, a line for each figure."""
        lines = {
            "model": f"{self.model}, {self.parameters / 1e6:.2f} M parameters",
            "cost": f"{self.gmacs:.3g} GMACs{_at_keep_rate(self.keep_rate)}, {self.gmacs_dense:.3g} dense",
            "best": _score(self.best, self.classes),
            "last": _score(self.last, self.classes),
            "best, moving average": _score(self.best_ema, self.classes),
            "last, moving average": _score(self.last_ema, self.classes),
            "trained": ", ".join(
                (
                    _counted(self.epochs, "epoch"),
                    _counted(self.steps, "step"),
                    _counted(self.images, "image"),
                    _counted(self.processes, "process", "processes"),
                )
            ),
            "time": f"{timedelta(seconds=round(self.seconds))}, {self.images_per_second:.4g} images/s",
            "peak memory": f"{self.peak_memory / 2**30:.2f} GiB" if self.peak_memory is not None else None,
            "unreadable images": f"{self.unreadable:,}, see unreadable.csv" if self.unreadable else "0",
            "checkpoints": self.checkpoints,
        }
        width = max(map(len, lines)) + 2
        return "\n".join(f"{name:<{width}}{text}" for name, text in lines.items() if text is not None)

    def save(self, path: Path) -> None:
        """Write the figures as JSON, in which null stands for numbers that are not finite.

        Raises:
            OSError: it cannot be written; an existing file stays as it was.
        """
        with replacing(path) as file:
            file.write(json.dumps(_finite(asdict(self)), indent=2, allow_nan=False) + "\n")


def _at_keep_rate(keep_rate: float | None) -> str:
    """Return words for a keep rate; none where the model's rule has none."""
    return "" if keep_rate is None else f" at keep rate {keep_rate:g}"


def better(best: Score | None, new: Score) -> Score:
    """Return the score with the higher top-1, of equals that with the lower loss, then the earlier one."""
    if best is None or new.top1 > best.top1:
        return new
    return new if new.top1 == best.top1 and new.loss < best.loss else best


def _score(score: Score | None, classes: int) -> str | None:
    if score is None:
        return None
    top5 = f", top-5 {score.top5:.2f} %" if classes > 5 else ""
    return f"top-1 {score.top1:.2f} %{top5}, loss {score.loss:.4f} (epoch {score.epoch})"


def _counted(number: int, one: str, many: str | None = None) -> str:
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(entry) for name, entry in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
