"""Evaluation: how often the model is right, over all processes, every image counted once."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from evit_ext._util.modes import eval_mode
from evit_ext.cost.tokens import count_tokens
from evit_ext.training.precision import Precision, autocast, choose_precision
from evit_ext.training.progress import Progress
from evit_ext.training.ranks import ALONE, Ranks


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What :func:`evaluate` found over all processes; the same on each of them.

    Attributes:
        top1: percent of the images whose label has the largest logit.
        top5: percent of the images whose label is among the 5 largest logits; 100 if there are fewer than 5
            classes.
        loss: mean cross-entropy, in nats.
        images: the number of images.
        images_per_second: for the time that the slowest process took, including loading its data.
        tokens_kept: share of the patch tokens that remain after the last stage, fused tokens included; 1 for
            a model that drops none.
        tokens_kept_by_stage: the same after each stage; empty for a model that drops none.
        unreadable: path and reason of each image that could not be read and was left out; sorted.
    """

    top1: float
    top5: float
    loss: float
    images: int
    images_per_second: float
    tokens_kept: float
    tokens_kept_by_stage: tuple[float, ...]
    unreadable: tuple[tuple[str, str], ...]


def evaluate(
    model: nn.Module,
    batches: Iterable[Any],
    precision: Precision | None = None,
    ranks: Ranks = ALONE,
    progress: bool = False,
    total: int | None = None,
    description: str = "evaluate",
) -> Evaluation:
    """Evaluate the model on the batches, in eval mode; afterwards its modules have their modes back.

    With several processes, each calls it with its own part of the images, without padding: parts may differ
    in size or be empty. Processes only exchange sums at the end, unless the model itself spans them (FSDP2,
    DistributedDataParallel): then processes that run out of batches go on with an image of zeros, which is
    not counted.

    Args:
        model: returns logits [B, classes].
        batches: tuples that begin with images float [B, C, H, W] and labels int64 [B]; B may be 0. Where one
            has an attribute ``unreadable``, it is a tuple of (path, reason) of images that are not in it.
        precision: by default chosen for the model's device.
        ranks: the processes that evaluate together.
        progress: show it, in the first process.
        description: what the progress says.
        total: number of batches, for the progress; by default their ``len``, where they have one.

    Raises:
        ValueError: no process has any image.
    """
    device = next(model.parameters()).device
    precision = precision or choose_precision(device)
    collective = any(isinstance(part, (FSDPModule, DistributedDataParallel)) for part in model.modules())
    together = collective and ranks.control is not None
    if total is None and hasattr(batches, "__len__"):
        total = len(batches)  # type: ignore[arg-type]
    sums = _Sums(device)
    unreadable: list[tuple[str, str]] = []
    start = time.perf_counter()
    # FSDP2 makes its parameters in the first forward: in inference mode, they could never be trained.
    gradients_off = torch.no_grad() if collective else torch.inference_mode()
    with eval_mode(model), gradients_off, Progress(description, total, progress and ranks.is_first) as bar:
        for batch, is_real in _in_step(batches, ranks, together):
            images, labels = batch[0], batch[1]
            if is_real:
                unreadable += [(str(path), str(reason)) for path, reason in getattr(batch, "unreadable", ())]
                bar.step()
            if not len(labels):
                if not together:
                    continue
                images, is_real = images.new_zeros(1, *images.shape[1:]), False
            with autocast(device, precision):
                logits = model(images.to(device, non_blocking=True))
            if is_real:
                sums.add(
                    logits, labels.to(device, non_blocking=True), count_tokens(model, tuple(images.shape[2:]))
                )
    numbers = sums.numbers()  # waits for a GPU
    seconds = time.perf_counter() - start
    # A process without images does not know how many stages there are; so all of one length.
    everywhere = ranks.gather((seconds, len(numbers), unreadable))
    longest = max(length for _, length, _ in everywhere)
    images_seen, loss, top1, top5, *tokens = ranks.sum([*numbers, *[0.0] * (longest - len(numbers))])
    if not images_seen:
        raise ValueError("there is no image to evaluate on")
    kept = tuple(count / tokens[0] for count in tokens[1:])
    return Evaluation(
        top1=100 * top1 / images_seen,
        top5=100 * top5 / images_seen,
        loss=loss / images_seen,
        images=int(images_seen),
        images_per_second=images_seen / max(seconds for seconds, _, _ in everywhere),
        tokens_kept=kept[-1] if kept else 1.0,
        tokens_kept_by_stage=kept,
        unreadable=tuple(sorted(entry for _, _, entries in everywhere for entry in entries)),
    )


class _Sums:
    """Sums over the images: of losses and right answers on the device, so that no batch waits for it."""

    def __init__(self, device: torch.device) -> None:
        self._images = 0
        self._sums = torch.zeros(3, dtype=torch.float64, device=device)
        self._tokens: list[int] = []

    def add(self, logits: Tensor, labels: Tensor, tokens: list[int]) -> None:
        """Add a batch; `tokens` are those of one image, before the first stage and after each."""
        logits = logits.float()
        losses = nn.functional.cross_entropy(logits, labels, reduction="none")
        right = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
        self._sums += torch.stack([losses.double().sum(), right[:, 0].sum(), right.sum()])
        self._images += len(labels)
        before = self._tokens or [0] * len(tokens)
        self._tokens = [have + count * len(labels) for have, count in zip(before, tokens, strict=True)]

    def numbers(self) -> list[float]:
        """Return images, loss, right answers and those among 5, and the counts of tokens."""
        return [float(self._images), *self._sums.tolist(), *map(float, self._tokens)]


def _in_step(batches: Iterable[Any], ranks: Ranks, together: bool) -> Iterator[tuple[Any, bool]]:
    """Yield this process' batches, each with True; where all go `together`, stand-ins after them, with False.

    All processes then get the same number, that of the longest part.
    """
    if not together:
        yield from ((batch, True) for batch in batches)
        return
    iterator = iter(batches)
    batch = next(iterator, None)
    own = None if batch is None else (batch[0].shape[1:], batch[0].dtype)
    like = next((part for part in ranks.gather(own) if part is not None), None)
    while ranks.sum([batch is not None])[0]:
        if batch is not None:
            yield batch, True
            batch = next(iterator, None)
        else:
            assert like is not None
            shape, dtype = like
            yield (torch.zeros(1, *shape, dtype=dtype), torch.zeros(1, dtype=torch.int64)), False
