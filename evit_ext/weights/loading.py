"""Load a checkpoint into a model: all of it, or nothing and an error that says why."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass

import torch
from timm.utils.model import unwrap_model
from torch import nn

from evit_ext._util.messages import shown
from evit_ext.weights.fitting import fit
from evit_ext.weights.layout import find_weights
from evit_ext.weights.placing import check_plain, place
from evit_ext.weights.reading import read_file
from evit_ext.weights.source import local_file

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedCheckpoint:
    """What :func:`load_checkpoint` loaded; ``str`` gives a summary of a few lines.

    Attributes:
        source: the path or URL that was given.
        kind: what model the weights belong to: "ViT" (timm's, DeiT's, this package's DeiTs and applied
            models all have the same keys), "EViT" (the same keys, saved with the published training code's
            arguments), "distilled DeiT", "LV-ViT", "DynamicViT" or "unknown".
        entry: where in the file they were found, such as "model" or "state_dict_ema"; "" if the file is a
            bare state dict.
        is_ema: whether they are a moving average.
        unused_entries: other weights in the file, which :func:`load_checkpoint`'s `use_ema` can choose.
        epoch: if the file gives it.
        loaded_keys: keys of the model that were loaded from the file.
        missing_keys: keys of the model that the file does not have; they keep the weights they had.
        unexpected_keys: keys of the file that were not loaded.
        resized_keys: keys whose weights were resized.
        head_keys: keys of heads that the file has for other classes; they keep the weights they had.
    """

    source: str
    kind: str
    entry: str
    is_ema: bool
    unused_entries: tuple[str, ...]
    epoch: int | None
    loaded_keys: tuple[str, ...]
    missing_keys: tuple[str, ...]
    unexpected_keys: tuple[str, ...]
    resized_keys: tuple[str, ...]
    head_keys: tuple[str, ...]

    def __str__(self) -> str:
        where = [f"entry {self.entry!r}"] if self.entry else []
        where += ["a moving average"] if self.is_ema else []
        where += [f"epoch {self.epoch}"] if self.epoch is not None else []
        lines = [
            f"{self.source}: {self.kind if self.kind != 'unknown' else 'other'} weights"
            f"{' (' + ', '.join(where) + ')' if where else ''}, {len(self.loaded_keys)} tensors loaded"
        ]
        for text, names in (
            ("resized", self.resized_keys),
            ("head as it was, for other classes", self.head_keys),
            ("as they were, missing in the file", self.missing_keys),
            ("in the file, not loaded", self.unexpected_keys),
            ("other weights in the file, see use_ema", self.unused_entries),
        ):
            if names:
                more = f" and {len(names) - 10} more" if len(names) > 10 else ""
                lines.append(f"  {text}: {', '.join(names[:10])}{more}")
        return "\n".join(lines)


def load_checkpoint(
    model: nn.Module,
    path_or_url: str | os.PathLike[str],
    *,
    strict: bool = True,
    resize_pos_embed: bool | tuple[int, int] = False,
    resize_head: bool = False,
    use_ema: bool | None = None,
    progress: bool = True,
) -> LoadedCheckpoint:
    """Load the weights of a file into `model`, in place; if they do not fit, raise an error and load nothing.

    It reads what DeiT, EViT, LV-ViT, DynamicViT, timm and this package write: a state dict, bare or under
    "model", "state_dict" and the like, with or without the prefixes of DistributedDataParallel and
    torch.compile, in safetensors or torch.save's format. Keys of other publications (CLIP, DINOv2, DeiT III,
    JAX's names …) are converted to timm's if timm's own filter for the model knows them.

    Nothing in a file is executed. Besides tensors and plain values, ``argparse.Namespace`` is read and
    objects of NumPy and pathlib are skipped; a file that needs anything else is refused.

    Args:
        model: any module, at best one of evit_ext or timm; before or after ``evit_ext.apply``, wrapped
            (DistributedDataParallel, torch.compile) or not. Its parameters keep their dtype and device.
        path_or_url: a path; an http(s) URL, which is downloaded once into torch's cache, and whose hash is
            checked if the file's name ends in one (``-cd65a155.pth``); or ``hf-hub:owner/name``, with or
            without ``@revision``.
        strict: refuse a file with unknown or missing keys. False loads the keys that both have; other shapes
            are refused even then. Two differences are always allowed: a DynamicViT's predictors may be
            missing and then keep their weights, and LV-ViT's auxiliary head may be in a file for a model
            without one.
        resize_pos_embed: resize a position embedding of another grid: this package's models the way the
            published EViT does, others as timm does; and patch embeddings with another kernel size, as timm
            does. If the file's grid is not square, give it as (height, width): the embedding does not tell.
        resize_head: if the file's heads are for other classes or missing, or the model has no head
            (``num_classes=0``), leave the model's heads as they are: in a new model, newly initialised.
        use_ema: True loads the moving average of the weights. None takes the plain weights if there are any,
            unlike timm, because the published code evaluates these.
        progress: show the progress of a download.

    Returns:
        What was loaded and what was not.

    Raises:
        TypeError: `model` is no module, `path_or_url` neither a path nor a URL, or an option of another type.
        ValueError: the file is damaged, no checkpoint, or has more in it than weights; or the weights do not
            fit, and the message lists why. The model is left as it was.
        FileNotFoundError, IsADirectoryError: there is no such file.
        RuntimeError: it could not be fetched.

    Example:
        >>> model = evit_ext.models.deit_small(keep_rate=0.7, num_classes=10)
        >>> print(evit_ext.load_checkpoint(model, "evit.pth", resize_head=True))
        evit.pth: EViT weights (entry 'model', epoch 299), 150 tensors loaded
          head as it was, for other classes: head.weight, head.bias
    """
    inner = _loadable(model)
    _check_options(
        {"strict": strict, "resize_head": resize_head, "progress": progress}, resize_pos_embed, use_ema
    )
    path = local_file(path_or_url, progress, read_file)
    name = os.fspath(path_or_url)
    weights = find_weights(read_file(path, name), use_ema, inner.state_dict().keys(), name)
    try:
        check_plain(weights.state)
        fitted = fit(
            weights.state,
            weights.others,
            inner,
            strict=strict,
            resize_pos_embed=resize_pos_embed,
            resize_head=resize_head,
        )
    except ValueError as error:
        raise ValueError(f"{name} does not fit: {error}") from error
    if fitted.problems:
        problems = "".join(f"\n  - {problem}" for problem in fitted.problems)
        raise ValueError(f"{name} does not fit {type(inner).__name__}:{problems}")
    try:
        place(inner, fitted.state)
    except ValueError as error:
        raise ValueError(f"{name} cannot be loaded: {error}") from error
    loaded = LoadedCheckpoint(
        source=name,
        kind=weights.kind,
        entry=weights.entry,
        is_ema=weights.is_ema,
        unused_entries=weights.unused,
        epoch=weights.epoch,
        loaded_keys=tuple(fitted.state),
        missing_keys=tuple(fitted.missing),
        unexpected_keys=tuple(fitted.unexpected),
        resized_keys=tuple(fitted.resized),
        head_keys=tuple(fitted.heads),
    )
    _logger.info("%s", loaded)
    return loaded


def _loadable(model: nn.Module) -> nn.Module:
    """Return the model inside the wrappers, or raise what is said about one that cannot take weights."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    inner: nn.Module = unwrap_model(model)
    for key, value in inner.state_dict().items():
        if not isinstance(value, torch.Tensor):
            continue
        if value.is_meta:
            raise ValueError(
                f"{type(inner).__name__}'s {key} is on the meta device, which holds no weights: build the "
                "model on another device, or call its to_empty(device=...) first"
            )
        if value.is_inference():
            raise ValueError(
                f"{type(inner).__name__}'s {key} was made in inference mode, and cannot be changed out of "
                "it: build the model outside"
            )
        if any(size > 1 and stride == 0 for size, stride in zip(value.shape, value.stride(), strict=True)):
            raise ValueError(
                f"{type(inner).__name__}'s {key} is expanded: several of its elements are one in memory, and "
                "cannot be loaded; make it a tensor of its own, with .clone()"
            )
        # A shard, or what a quantisation keeps in its place: copying into it may fail halfway.
        if type(value) is not torch.Tensor:
            raise ValueError(
                f"{type(inner).__name__}'s {key} is a {type(value).__name__}, no plain tensor: load the "
                "checkpoint before the model is sharded or quantised"
            )
    return inner


def _check_options(flags: dict[str, object], resize_pos_embed: object, use_ema: object) -> None:
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, got {shown(value)}")
    if use_ema is not None and not isinstance(use_ema, bool):
        raise TypeError(f"use_ema must be True, False or None, got {shown(use_ema)}")
    if isinstance(resize_pos_embed, bool):
        return
    expected = "resize_pos_embed must be True, False or the grid that the weights are for, (height, width)"
    if not isinstance(resize_pos_embed, tuple) or len(resize_pos_embed) != 2:
        raise TypeError(f"{expected}, got {shown(resize_pos_embed)}")
    if any(not isinstance(side, int) or isinstance(side, bool) for side in resize_pos_embed):
        raise TypeError(f"{expected}, got {shown(resize_pos_embed)}")
    if min(resize_pos_embed) < 1:
        raise ValueError(f"{expected}, got {shown(resize_pos_embed)}")
