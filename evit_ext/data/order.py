"""The order of the images, determined by seed and epoch alone, and how it is split between processes.

A sample is identified by its position in the epoch's order. Position p belongs to optimizer step p // G,
where G is the batch size, and within it to micro-batch (p % G) % M, where M is the number of micro-batches of
a step over all processes. Process r of w computes the micro-batches r, r + w, r + 2w, … of a step. The same M
thus gives the same micro-batches for any number of processes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Sampler

from evit_ext._util.randomness import derive_seed
from evit_ext.data.sizes import steps_per_epoch

# Key of the random numbers for shuffling, which must differ from those for augmentation.
_ORDER = 1


class Place(NamedTuple):
    """A sample: the epoch, its position in the epoch's order, and its image's index in the data set."""

    epoch: int
    position: int
    image: int


def epoch_order(num_images: int, seed: int, epoch: int, repeats: int = 1) -> Tensor:
    """Return the order of an epoch's images: indices, int64 [num_images].

    Args:
        num_images: of the data set.
        seed: of the run.
        epoch: counted from 0; each has its own order.
        repeats: repeated augmentation, as in DeiT's RASampler: every image comes this often in a row until
            the epoch is full; the remaining images of the shuffled order are left out.
    """
    generator = torch.Generator().manual_seed(derive_seed(seed, epoch, _ORDER))
    order = torch.randperm(num_images, generator=generator)
    return order.repeat_interleave(repeats)[:num_images]


class TrainOrder(Sampler[list[Place]]):
    """The micro-batches of one process, epoch by epoch; a batch sampler for torch's DataLoader.

    The last images of an epoch that do not fill a batch are dropped; these differ between epochs. ``start``
    chooses the epoch and step to begin with; earlier images are not read.

    Args:
        num_images: of the data set.
        micro_batch: images per micro-batch.
        accumulation: micro-batches that a process computes per optimizer step.
        rank: of this process.
        world_size: number of processes.
        seed: of the run.
        repeats: see :func:`epoch_order`.

    Raises:
        ValueError: the data set is smaller than one batch.
    """

    def __init__(
        self,
        num_images: int,
        micro_batch: int,
        accumulation: int = 1,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        repeats: int = 1,
    ) -> None:
        self.num_images = num_images
        self.micro_batches = world_size * accumulation
        self.batch_size = micro_batch * self.micro_batches
        self.steps = steps_per_epoch(num_images, self.batch_size)
        self.rank, self.world_size = rank, world_size
        self.seed, self.repeats = seed, repeats
        self.start(0)

    def start(self, epoch: int, first_step: int = 0) -> None:
        """Choose where the next iteration begins.

        Raises:
            ValueError: the epoch has no such step.
        """
        if not 0 <= first_step <= self.steps:
            raise ValueError(f"first_step must be in [0, {self.steps}], got {first_step}")
        self.epoch, self.first_step = epoch, first_step

    def __len__(self) -> int:
        return (self.steps - self.first_step) * self.micro_batches // self.world_size

    def __iter__(self) -> Iterator[list[Place]]:
        order = epoch_order(self.num_images, self.seed, self.epoch, self.repeats)
        for step in range(self.first_step, self.steps):
            begin = step * self.batch_size
            for micro in range(self.rank, self.micro_batches, self.world_size):
                positions = range(begin + micro, begin + self.batch_size, self.micro_batches)
                indices = order[positions.start : positions.stop : positions.step].tolist()
                yield [Place(self.epoch, *place) for place in zip(positions, indices, strict=True)]


class EvaluationOrder(Sampler[list[Place]]):
    """Every image once over all processes: process r has indices r, r + w, …; its last batch can be smaller.

    The numbers of images and batches can differ between processes.

    Args:
        num_images: of the data set.
        batch_size: of one process.
        rank: of this process.
        world_size: number of processes.
    """

    def __init__(self, num_images: int, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        self.indices = range(rank, num_images, world_size)
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    def __iter__(self) -> Iterator[list[Place]]:
        for start in range(0, len(self.indices), self.batch_size):
            yield [Place(0, index, index) for index in self.indices[start : start + self.batch_size]]
