"""The evaluations of a run, and the files of the weights that were evaluated."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from evit_ext._util.files import replacing
from evit_ext._util.safetensors_bytes import to_bytes
from evit_ext.training.evaluation import Evaluation
from evit_ext.training.ranks import Ranks
from evit_ext.training.run.summary import Score, better
from evit_ext.training.sharding import whole_state

#: What is evaluated, and the file of its last weights.
FILES = {"model": "last.safetensors", "ema": "last_ema.safetensors"}


class Results:
    """The evaluations of a run.

    The best one has the highest top-1 among those at the newest keep rate. While the keep rate falls, the
    task becomes harder, so earlier evaluations with more patches cannot be compared with later ones.

    Args:
        folder: where the weights are written.
        ranks: the processes; the first one writes.
        model: its name, for the weights' files.
    """

    def __init__(self, folder: Path, ranks: Ranks, model: str) -> None:
        self._folder, self._ranks, self._model = folder, ranks, model
        self._entries: list[dict[str, Any]] = []
        #: Names of the classes, for the weights' files; empty where the data does not name them.
        self.classes: Sequence[str] = ()

    def has(self, epoch: int) -> bool:
        """Return whether the evaluation after an epoch, from 1, was made."""
        return any(entry["epoch"] == epoch for entry in self._entries)

    def add(
        self,
        epoch: int,
        keep_rate: float | None,
        found: Mapping[str, Evaluation],
        models: Mapping[str, nn.Module],
    ) -> None:
        """Add the evaluations after an epoch, of the model and perhaps of its moving average.

        Writes ``last.safetensors`` and ``last_ema.safetensors``, and ``best.safetensors`` if one of them is
        the best so far. Every process must call it, because each has a part of a sharded model.

        Args:
            epoch: from 1.
            keep_rate: of the model at that time.
            found: by "model" and "ema".
            models: likewise.

        Raises:
            OSError: a file cannot be written.
        """
        scores = (score for name in FILES for score in self._scores(name, keep_rate))
        best = functools.reduce(better, scores, None)
        entry: dict[str, Any] = {"epoch": epoch, "keep_rate": keep_rate}
        for name, evaluation in found.items():
            entry[name] = {"top1": evaluation.top1, "top5": evaluation.top5, "loss": evaluation.loss}
            files = [FILES[name]]
            score = Score.of(evaluation, epoch)
            if better(best, score) is score:
                best = score
                files.append("best.safetensors")
            self._write(files, models[name], {"weights": name, "top1": f"{evaluation.top1:.3f}", **entry})
        self._entries.append(entry)

    def _write(self, files: list[str], model: nn.Module, facts: Mapping[str, Any]) -> None:
        state = whole_state(model)
        if not self._ranks.is_first:
            return
        tensors = {key: value.detach().cpu().contiguous() for key, value in state.items()}
        said = {key: str(facts[key]) for key in ("weights", "top1", "epoch", "keep_rate")}
        if self.classes:
            said["classes"] = json.dumps(list(self.classes))
        content = to_bytes(tensors, {"model": self._model, **said})
        for file in files:
            with replacing(self._folder / file, "wb") as target:
                target.write(content)

    def best(self, name: str) -> Score | None:
        """Return the best evaluation of "model" or "ema", see `better`; None if there is none."""
        if not self._entries:
            return None
        return functools.reduce(better, self._scores(name, self._entries[-1]["keep_rate"]), None)

    def last(self, name: str) -> Score | None:
        """Return the last evaluation of "model" or "ema"; None if there is none."""
        scores = self._scores(name, None)
        return scores[-1] if scores else None

    def _scores(self, name: str, keep_rate: float | None) -> list[Score]:
        return [
            Score(epoch=entry["epoch"], **entry[name])
            for entry in self._entries
            if name in entry and keep_rate in (None, entry["keep_rate"])
        ]

    def state(self) -> list[dict[str, Any]]:
        """Return the evaluations, for a checkpoint."""
        return self._entries

    def load_state(self, state: list[dict[str, Any]]) -> None:
        """Take the evaluations that :meth:`state` returned."""
        self._entries = list(state)
