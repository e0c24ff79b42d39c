"""A training recipe: every number of the optimisation, in one place, named as in timm."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any


def option(default: Any, description: str) -> Any:
    """Return a dataclass field with its default and what it means, which ``evit train --help`` prints."""
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata={"help": description})
    return field(default=default, metadata={"help": description})


def raise_problems(problems: Sequence[str]) -> None:
    """Raise ValueError with all problems, a line each, if there are any."""
    if len(problems) == 1:
        raise ValueError(problems[0])
    if problems:
        raise ValueError("\n  ".join([f"{len(problems)} things are wrong:", *problems]))


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to optimise. ``evit train --help`` explains each field, as does its ``metadata["help"]``.

    Raises:
        ValueError: a number out of its range.
    """

    epochs: int = option(300, "passes over the training data")
    batch_size: int = option(1024, "images an optimizer step, over all processes")
    lr: float = option(
        1e-3, "peak learning rate for this batch size; falls to min_lr along a half cosine, step by step"
    )
    min_lr: float = option(1e-5, "learning rate at the end")
    warmup_epochs: float = option(
        5, "epochs, or a part of one, over which the learning rate rises from warmup_lr in a straight line"
    )
    warmup_lr: float = option(1e-6, "learning rate of the first step, where there is a warm-up")
    optimizer: str = option("adamw", "any of timm's, by name")
    weight_decay: float = option(0.05, "as timm applies it: not to biases, norms and embeddings")
    clip_grad: float | None = option(None, "largest norm of the gradient; none does not clip")
    label_smoothing: float = option(0.0, "share of the target that is spread over all classes")
    mixup: float = option(0.0, "alpha of mixup; 0 is none")
    cutmix: float = option(0.0, "alpha of CutMix; 0 is none")
    mix_prob: float = option(1.0, "share of the batches that are mixed, where mixup or cutmix is above 0")
    cutmix_share: float = option(0.5, "share of CutMix among the mixed batches, where both are above 0")
    ema_decay: float | None = option(
        None, "decay of an exponential moving average of the weights; none keeps none"
    )
    keep_rate: float | None = option(None, "keep rate of an EViT at the end; none leaves the model's own")
    keep_rate_start_epoch: float = option(0, "up to here the keep rate is 1")
    keep_rate_end_epoch: float = option(0, "from here on it is keep_rate; between them a half cosine")
    keep_rate_token_step: int | None = option(
        None,
        "the keep rate falls in steps of this many tokens of the first stage, so that torch.compile compiles "
        "a bounded number of times; none falls a little at every optimizer step, as published",
    )
    eval_mode: bool = option(
        False, "train in eval mode, without dropout and drop path, as published for fine-tuning"
    )

    def __post_init__(self) -> None:
        raise_problems(list(self.problems()))

    def problems(self) -> Iterator[str]:
        """Yield what is wrong with the values, a sentence each."""
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                yield (f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("lr", "min_lr", "warmup_lr", "warmup_epochs", "weight_decay", "mixup", "cutmix"):
            if not getattr(self, name) >= 0:
                yield (f"{name} must not be negative, got {getattr(self, name)}")
        for name in ("mix_prob", "cutmix_share"):
            if not 0 <= getattr(self, name) <= 1:
                yield (f"{name} must be in [0, 1], got {getattr(self, name)}")
        if not 0 <= self.label_smoothing < 1:
            yield (f"label_smoothing must be in [0, 1), got {self.label_smoothing}")
        if self.warmup_epochs >= self.epochs >= 1:
            yield (f"warmup_epochs {self.warmup_epochs} must be less than epochs {self.epochs}")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            yield (f"ema_decay must be in (0, 1), got {self.ema_decay}")
        if self.clip_grad is not None and not self.clip_grad > 0:
            yield (f"clip_grad must be positive, got {self.clip_grad}")
        if self.keep_rate is not None and not 0 < self.keep_rate <= 1:
            yield (f"keep_rate must be in (0, 1], got {self.keep_rate}")
        if self.keep_rate_token_step is not None and self.keep_rate_token_step < 1:
            yield (f"keep_rate_token_step must be at least 1, got {self.keep_rate_token_step}")
        if not 0 <= self.keep_rate_start_epoch <= self.keep_rate_end_epoch:
            yield (
                "expected 0 <= keep_rate_start_epoch <= keep_rate_end_epoch, got "
                f"{self.keep_rate_start_epoch} and {self.keep_rate_end_epoch}"
            )
        if self.keep_rate is not None and self.keep_rate < 1 and self.keep_rate_end_epoch > self.epochs:
            yield (
                f"keep_rate_end_epoch {self.keep_rate_end_epoch} must be at most epochs {self.epochs}: the "
                f"keep rate would not reach {self.keep_rate}"
            )

    def for_batch_size(self, batch_size: int) -> Recipe:
        """Return the recipe for another batch size, with the learning rates scaled in proportion."""
        factor = batch_size / self.batch_size
        return replace(
            self,
            batch_size=batch_size,
            lr=self.lr * factor,
            min_lr=self.min_lr * factor,
            warmup_lr=self.warmup_lr * factor,
        )

    def optimisation(self) -> dict[str, Any]:
        """Return the fields that are a :class:`Recipe`'s own, whatever else a subclass has."""
        return {entry.name: getattr(self, entry.name) for entry in fields(Recipe)}
