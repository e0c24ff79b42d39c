"""A training recipe: every number of a training run, in one place, named as in timm."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Recipe:
    """How to train.

    Attributes:
        epochs: passes over the training data.
        batch_size: images a step.
        lr: peak learning rate, for this batch size; falls to `min_lr` along a half cosine, step by step.
        min_lr: learning rate at the end.
        warmup_epochs: epochs, or a part of one, over which it rises linearly from `warmup_lr`.
        warmup_lr: learning rate of the first step, where there is a warm-up.
        optimizer: any of timm's, by name.
        weight_decay: as timm applies it, not to biases, norms and embeddings.
        clip_grad: largest norm of the gradient; None does not clip.
        label_smoothing: share of the target spread over all classes.
        mixup: alpha of mixup; 0 is none.
        cutmix: alpha of CutMix; 0 is none.
        ema_decay: decay of an exponential moving average of the weights; None keeps none.
        keep_rate: keep rate of an EViT at the end; ignored for a model that does not reorganise tokens. None
            leaves the model's own.
        keep_rate_start_epoch: up to here the keep rate is 1,
        keep_rate_end_epoch: from here on it is `keep_rate`; between them a half cosine.
        eval_mode: train in eval mode, that is without dropout and drop path, as published for fine-tuning.

    Raises:
        ValueError: a number out of its range.
    """

    epochs: int = 300
    batch_size: int = 1024
    lr: float = 1e-3
    min_lr: float = 1e-5
    warmup_epochs: float = 5
    warmup_lr: float = 1e-6
    optimizer: str = "adamw"
    weight_decay: float = 0.05
    clip_grad: float | None = None
    label_smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    ema_decay: float | None = None
    keep_rate: float | None = None
    keep_rate_start_epoch: float = 0
    keep_rate_end_epoch: float = 0
    eval_mode: bool = False

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("lr", "min_lr", "warmup_lr", "warmup_epochs", "weight_decay", "mixup", "cutmix"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing must be in [0, 1), got {self.label_smoothing}")
        if self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs {self.warmup_epochs} must be less than epochs {self.epochs}")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"ema_decay must be in (0, 1), got {self.ema_decay}")
        if self.clip_grad is not None and not self.clip_grad > 0:
            raise ValueError(f"clip_grad must be positive, got {self.clip_grad}")
        if self.keep_rate is not None and not 0 < self.keep_rate <= 1:
            raise ValueError(f"keep_rate must be in (0, 1], got {self.keep_rate}")
        if not 0 <= self.keep_rate_start_epoch <= self.keep_rate_end_epoch:
            raise ValueError(
                "expected 0 <= keep_rate_start_epoch <= keep_rate_end_epoch, got "
                f"{self.keep_rate_start_epoch} and {self.keep_rate_end_epoch}"
            )

    def for_batch_size(self, batch_size: int) -> Recipe:
        """The recipe for another batch size, with the learning rates scaled in proportion to it."""
        factor = batch_size / self.batch_size
        return replace(
            self,
            batch_size=batch_size,
            lr=self.lr * factor,
            min_lr=self.min_lr * factor,
            warmup_lr=self.warmup_lr * factor,
        )


#: Training from scratch on ImageNet-1k as published (Liang et al., ICLR 2022, section 4), with DeiT's label
#: smoothing, first and last learning rate. What it does to the images (RandAugment m9, random erasing 0.25,
#: repeated augmentation) is the loader's part, drop path 0.1 the model's.
FROM_SCRATCH = Recipe(
    epochs=300,
    batch_size=2048,
    lr=5e-4 * 2048 / 512,
    min_lr=1e-5,
    warmup_epochs=5,
    weight_decay=0.05,
    label_smoothing=0.1,
    mixup=0.8,
    cutmix=1.0,
    ema_decay=0.99996,
    keep_rate=0.7,
    keep_rate_start_epoch=10,
    keep_rate_end_epoch=110,
)

#: Fine-tuning an EViT from a trained dense model on ImageNet-1k. Published are the 30 epochs, the learning
#: rates, the weight decay, eval mode and that the keep rate does not warm up; the batch size, and that labels
#: are neither mixed nor smoothed, are choices here.
FINE_TUNE = Recipe(
    epochs=30,
    batch_size=1024,
    lr=2e-5,
    min_lr=2e-6,
    warmup_epochs=0,
    weight_decay=1e-6,
    keep_rate=0.7,
    eval_mode=True,
)
