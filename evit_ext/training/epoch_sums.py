"""Loss and accuracy of an epoch, summed on the device where the model computes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from evit_ext.training.ranks import Ranks


class EpochResult(NamedTuple):
    """`loss` and `accuracy` (in percent, for the unmixed labels) are means over an epoch of training."""

    loss: float
    accuracy: float
    keep_rate: float | None
    images_per_second: float


class EpochSums:
    """Sums of losses and right answers over the images of this process, on its device."""

    def __init__(self, device: torch.device) -> None:
        self._loss = torch.zeros((), dtype=torch.float64, device=device)
        self._correct = torch.zeros((), dtype=torch.int64, device=device)
        self.images = 0

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Add a batch with its mean `loss`."""
        self._loss += loss.double() * len(labels)
        self._correct += (logits.argmax(dim=1) == labels).sum()
        self.images += len(labels)

    @property
    def mean_loss(self) -> float:
        """The mean over the images of this process; waits for a GPU."""
        return self._loss.item() / self.images

    @property
    def accuracy(self) -> float:
        """In percent, of the images of this process; waits for a GPU."""
        return 100 * self._correct.item() / self.images

    def state_dict(self, ranks: Ranks) -> dict[str, float]:
        """Return the sums over all processes; every process must call it."""
        loss, correct, images = ranks.sum([self._loss.item(), self._correct.item(), self.images])
        return {"loss": loss, "correct": correct, "images": images}

    def load_state_dict(self, state: Mapping[str, float], ranks: Ranks) -> None:
        """Continue from sums over all processes; the first process keeps them."""
        share = state if ranks.is_first else dict.fromkeys(state, 0)
        self._loss.fill_(share["loss"])
        self._correct.fill_(int(share["correct"]))
        self.images = int(share["images"])

    def result(self, ranks: Ranks, keep_rate: float | None, images_per_second: float) -> EpochResult:
        """Return the means over all processes; every process must call it."""
        sums = self.state_dict(ranks)
        loss, accuracy = sums["loss"] / sums["images"], 100 * sums["correct"] / sums["images"]
        return EpochResult(loss, accuracy, keep_rate, images_per_second)
