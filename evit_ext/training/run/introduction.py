"""What a run says before its first step: the model, the data, how it learns, what images go through."""

from __future__ import annotations

from typing import Any

from timm.utils.model import unwrap_model

from evit_ext.patching.keep_rates import keep_rates
from evit_ext.training.config import TrainConfig
from evit_ext.training.evaluation import Evaluation
from evit_ext.training.loaders import Loaders
from evit_ext.training.precision import Precision
from evit_ext.training.ranks import Ranks


def introduce(config: TrainConfig, loaders: Loaders, model: Any, precision: Precision, ranks: Ranks) -> str:
    """Return a block of lines, without one for where the run is.

    Args:
        config: of the run.
        loaders: its data.
        model: to be trained, wrapped or not.
        precision: of its forwards.
        ranks: the processes.
    """
    model = unwrap_model(model)
    micro_batch, accumulation = config.micro_batches(ranks.world_size)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    images = "" if loaders.val_images is None else f", {loaders.val_images:,} to evaluate on"
    shape = f"{ranks.world_size} x {accumulation} x {micro_batch} images"
    lines = [
        f"{config.model}: {parameters / 1e6:.2f} M parameters, {loaders.num_classes} classes, on "
        f"{ranks.device}, {precision}",
        f"{loaders.train_images:,} images an epoch{images}; {loaders.steps_per_epoch:,} steps of {shape} "
        "(processes, accumulated, at once)",
        f"learning rate {config.lr:.3g} at batch size {config.batch_size}, falling to {config.min_lr:.3g} "
        f"over {config.epochs} epochs, warm-up {config.warmup_epochs:g}; {config.optimizer}, weight decay "
        f"{config.weight_decay:g}",
        f"keep rate {_keep_rate(config, model)}; weights at the start: {_weights(config)}",
        f"images of {' x '.join(map(str, model.patch_embed.img_size))} pixels: {_augmentation(config)}",
        *loaders.words,
    ]
    return "\n".join(lines)


def in_short(found: Evaluation, num_classes: int) -> str:
    """Return an evaluation in a few words."""
    # Of five classes or fewer, every image is right among five.
    top5 = f", top-5 {found.top5:.2f} %" if num_classes > 5 else ""
    return f"top-1 {found.top1:.2f} %{top5}, loss {found.loss:.4f}"


def _keep_rate(config: TrainConfig, model: Any) -> str:
    if config.keep_rate is None:
        given = " ".join(f"{name}={value}" for name, value in config.rule_args.items())
        rates = " ".join(f"{rate:g}" for rate in keep_rates(model))
        return rates or f"none, as rule {config.rule} has {given or 'none'}"
    if config.keep_rate_end_epoch <= 0:
        return f"{config.keep_rate:g}"
    return (
        f"falling from 1 to {config.keep_rate:g} between epochs {config.keep_rate_start_epoch:g} and "
        f"{config.keep_rate_end_epoch:g}"
    )


def _weights(config: TrainConfig) -> str:
    if config.oracle is not None:
        return "the oracle's"
    if config.initial_checkpoint is not None:
        return config.initial_checkpoint
    return "pretrained" if config.pretrained else "random"


def _augmentation(config: TrainConfig) -> str:
    if config.dataset in ("digits", "cluttered-digits"):
        return "drawn by the data set"
    if not config.augment:
        return "as in evaluation"
    low, high = config.scale
    jitter = f"colour jitter {config.color_jitter:g}" if config.color_jitter else ""
    parts = {
        f"crops of {low:g} to {high:g} of the area": True,
        f"flips {config.hflip:g}": config.hflip > 0,
        str(config.auto_augment or jitter): bool(config.auto_augment or jitter),
        f"random erasing {config.reprob:g}": config.reprob > 0,
        f"mixup {config.mixup:g}": config.mixup > 0,
        f"CutMix {config.cutmix:g}": config.cutmix > 0,
        f"label smoothing {config.label_smoothing:g}": config.label_smoothing > 0,
        f"each image {config.repeated_aug} times in a row": config.repeated_aug > 1,
    }
    return ", ".join(text for text, there in parts.items() if there)
