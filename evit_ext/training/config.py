"""The configuration of a run as one flat file: recipe, model, data, losses and how it runs."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from evit_ext._util.files import replacing
from evit_ext._util.hints import as_hinted
from evit_ext._util.messages import reason, shortened, shown
from evit_ext._util.spelling import nearest
from evit_ext.training.recipe import Recipe, option, raise_problems

PRECISIONS = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Recipe):
    """Everything that defines a run of ``evit train``: a :class:`Recipe`, the model, the data and the rest.

    ``evit train --help`` explains each field, as does its ``metadata["help"]``. Fields are numbers, strings,
    booleans and None, and dicts and tuples of these, so that reading a file of them executes nothing.

    Raises:
        ValueError: a value out of its range, or two that contradict each other.
    """

    # Model
    model: str = option("deit_small", "of evit_ext.models, or any of timm's that evit_ext.apply supports")
    model_args: dict[str, Any] = option(
        {}, "further arguments of the model, name=value, such as embed_dim=96 or global_pool=avg"
    )
    img_size: int | None = option(None, "side of the square images in pixels; none is the model's own")
    num_classes: int | None = option(None, "none is what the data has")
    drop_loc: tuple[int, ...] | None = option(
        None, "numbers of the reorganising blocks, from 0; none is those at the quarters of the depth"
    )
    fuse_token: bool = option(True, "fuse the patches that are not kept into one token")
    rule: str | None = option(
        None, "how tokens are reduced, by the name of a rule, such as random; none is the model's own"
    )
    rule_args: dict[str, Any] = option({}, "further settings of the rule, name=value, not its keep rate")
    drop_path: float = option(0.0, "drop path rate of the last block; falls linearly towards the first")
    pretrained: bool = option(False, "start from the model's pretrained weights, as timm downloads them")
    initial_checkpoint: str | None = option(
        None, "start from the weights of a file: whatever evit_ext.load_checkpoint reads"
    )
    grad_checkpointing: bool = option(
        False, "compute activations again for the gradient instead of keeping them"
    )
    compile: bool = option(False, "torch.compile the model")

    # Data
    dataset: str = option(
        "",
        "none for a folder of images or tar files; 'wds' for WebDataset, 'hfds/NAME' and 'hfids/NAME' for "
        "Hugging Face data sets; 'digits' and 'cluttered-digits', which need no files",
    )
    data: str | None = option(None, "where the data set lies, with its splits in folders train and val")
    train_split: str = option("train", "name of the training split; of WebDataset, its shards")
    val_split: str = option("validation", "name of the split to evaluate on; of WebDataset, its shards")
    val_fraction: float = option(
        0.2,
        "share of the images of each class that is held out for validation, where a folder has no validation "
        "split; 1 evaluates all images of a folder without splits",
    )
    train_images: int | None = option(
        None, "images an epoch: of cluttered-digits, and of streams whose size is not known"
    )
    difficulty: str = option("easy", "of cluttered-digits: easy or hard")
    workers: int = option(4, "processes a rank that load images; 0 loads in the training process")
    max_image_pixels: int = option(89_478_485, "a larger image counts as unreadable")
    max_unreadable: int = option(
        100, "unreadable images that are reported and skipped before a run stops; 0 stops at the first"
    )

    # What is done to the images
    augment: bool = option(True, "False shows the images as in evaluation, but shuffled")
    scale: tuple[float, float] = option((0.08, 1.0), "share of the image's area that a random crop has")
    ratio: tuple[float, float] = option((3 / 4, 4 / 3), "aspect ratio of a random crop")
    hflip: float = option(0.5, "probability of a horizontal flip")
    color_jitter: float = option(0.4, "strength of colour jitter, where auto_augment does not replace it")
    auto_augment: str | None = option(None, "timm's name of a policy, such as rand-m9-mstd0.5-inc1")
    reprob: float = option(0.0, "probability of random erasing")
    remode: str = option("pixel", "what erased places are filled with: const, rand or pixel")
    recount: int = option(1, "places that are erased")
    repeated_aug: int = option(
        0,
        "times that an image is drawn in a row, differently augmented; an epoch keeps its size; 0 is 1; not "
        "of streams and digits",
    )
    interpolation: str = option("random", "of training images: bilinear, bicubic or random")
    crop_pct: float | None = option(
        None, "share of a test image's side that is seen; none is the model's own"
    )
    token_labels: str | None = option(
        None, "folder of LV-ViT's token labels, with a .pt file for every training image"
    )

    # Losses
    distillation: str = option("none", "none, soft or hard, as of DeiT; needs a teacher")
    teacher: str | None = option(None, "a model, for distillation and for DynamicViT's losses")
    teacher_args: dict[str, Any] = option({}, "further arguments of the teacher, name=value")
    teacher_checkpoint: str | None = option(None, "its weights; none takes its pretrained ones")
    distillation_alpha: float = option(0.5, "weight of the distillation loss; the other has 1 - alpha")
    distillation_tau: float = option(1.0, "temperature of soft distillation")
    oracle: str | None = option(
        None,
        "a ViT that has been trained, which chooses the patches to keep; the model starts from its weights",
    )
    oracle_args: dict[str, Any] = option({}, "further arguments of the oracle, name=value")
    oracle_checkpoint: str | None = option(None, "its weights; none takes its pretrained ones")
    ratio_weight: float = option(2.0, "of a DynamicViT: weight of the loss of its keep ratios")
    distill_weight: float = option(0.5, "of a DynamicViT: weight of the losses against the teacher")
    dense_weight: float = option(0.5, "of an LV-ViT: weight of the patches' loss")
    cls_weight: float = option(1.0, "of an LV-ViT: weight of the class token's loss")

    # The run
    seed: int = option(0, "of weights, order, augmentation and everything else that is random")
    precision: str = option("auto", "auto, float32, bfloat16 or float16")
    micro_batch: int | None = option(
        None,
        "images that a process takes at once; gradients add up to the batch size. None is batch_size divided "
        "by the processes",
    )
    sharding: str = option(
        "ddp", "over several processes: ddp, every one has the whole model; fsdp, each a part of it"
    )
    checkpoint_every: int | None = option(
        None, "optimizer steps between checkpoints; there is always one at the end of an epoch"
    )
    keep_checkpoints: int = option(2, "older ones are deleted")
    eval_every: int = option(1, "epochs between evaluations; the last epoch is always evaluated")
    log_every: int = option(50, "optimizer steps between lines of metrics")

    def problems(self) -> Iterator[str]:
        """Yield what is wrong with the values, a sentence each."""
        yield from super().problems()
        choices = {
            "distillation": ("none", "soft", "hard"),
            "difficulty": ("easy", "hard"),
            "precision": PRECISIONS,
            "sharding": ("ddp", "fsdp"),
            "remode": ("const", "rand", "pixel"),
            "interpolation": ("bilinear", "bicubic", "random"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                yield f"{name} must be one of {', '.join(allowed)}, got {shown(getattr(self, name))}"
        at_least = {
            "img_size": 1, "num_classes": 1, "train_images": 1, "micro_batch": 1, "checkpoint_every": 1,
            "workers": 0, "max_image_pixels": 1, "max_unreadable": 0, "recount": 1, "repeated_aug": 0,
            "keep_checkpoints": 1, "eval_every": 1, "log_every": 1,
        }  # fmt: skip
        for name, least in at_least.items():
            value = getattr(self, name)
            if value is not None and value < least:
                yield f"{name} must be at least {least}, got {shown(value)}"
        for name in ("drop_path", "hflip", "color_jitter", "reprob", "distillation_alpha"):
            if not 0 <= getattr(self, name) <= 1:
                yield (f"{name} must be in [0, 1], got {getattr(self, name)}")
        if not 0 < self.val_fraction <= 1:
            yield (f"val_fraction must be in (0, 1], got {self.val_fraction}")
        for name in ("scale", "ratio"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                yield (f"{name} must be a range (low, high) of positive numbers, got {(low, high)}")
        if not self.distillation_tau > 0:
            yield (f"distillation_tau must be positive, got {self.distillation_tau}")
        if self.eval_mode and self.drop_path > 0:
            yield (
                "eval_mode trains without drop path: drop_path must be 0, or eval_mode false, got "
                f"{self.drop_path}"
            )
        falls = self.keep_rate is not None and self.keep_rate < 1
        falls = falls and self.keep_rate_start_epoch < self.keep_rate_end_epoch
        if self.compile and falls and self.keep_rate_token_step is None:
            yield (
                "compile with a keep rate that falls at every step would compile at every step: set "
                "keep_rate_token_step, such as 8, or compile false"
            )
        if self.distillation != "none" and self.teacher is None:
            yield (f"distillation {shown(self.distillation)} needs a teacher, got none")

    def micro_batches(self, world_size: int) -> tuple[int, int]:
        """Return how many images each of the processes takes at once, and how often in an optimizer step.

        Raises:
            ValueError: the batch size is not a multiple of what all processes take at once, or mixing would
                have an image without a partner.
        """
        micro_batch = self.micro_batch or max(1, self.batch_size // world_size)
        at_once = micro_batch * world_size
        if self.batch_size % at_once:
            below = self.batch_size // at_once * at_once
            near = f"{below} or {below + at_once}" if below else str(at_once)
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of {world_size} processes times micro_batch "
                f"{micro_batch} images; {near} would be"
            )
        if micro_batch % 2 and (self.mixup > 0 or self.cutmix > 0):
            raise ValueError(
                f"mixup and cutmix mix pairs of images: micro_batch must be even, got {micro_batch}"
            )
        return micro_batch, self.batch_size // at_once

    def to_yaml(self) -> str:
        """Return all fields, as :func:`load_config` reads them."""
        values = {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in typed(asdict(self), "config").items()
        }
        return yaml.safe_dump(values, sort_keys=False)

    def save(self, path: Path) -> None:
        """Write all fields, as :func:`load_config` reads them; the file is there as a whole or not at all."""
        with replacing(path) as file:
            file.write(self.to_yaml())


def recipe_names() -> list[str]:
    """Return the names of the recipes that come with the package."""
    folder = resources.files("evit_ext.training") / "recipes"
    return sorted(
        entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml")
    )


def load_config(recipe: str | Path | None = None, **overrides: Any) -> TrainConfig:
    """Return the configuration of a recipe.

    Args:
        recipe: the name of one that comes with the package (:func:`recipe_names`), or the path of a YAML
            file, such as a run's config.yaml; None for the defaults.
        overrides: fields to change. Another batch size scales the learning rates in proportion, unless a
            learning rate is among the overrides, too.

    Raises:
        FileNotFoundError: no such recipe.
        ValueError: not YAML, not a mapping, too large, an unknown field, or a value out of its range.
        TypeError: a value of another type than the field's.
    """
    config = TrainConfig()
    if recipe is not None:
        values = typed(_read(recipe), str(recipe))
        try:
            config = TrainConfig(**values)
        except ValueError as error:
            raise ValueError(f"{recipe}: {error}") from error
    overrides = typed(overrides, "options")
    batch_size = overrides.get("batch_size")
    if batch_size is not None and batch_size >= 1 and not {"lr", "min_lr", "warmup_lr"} & set(overrides):
        config = typing.cast(TrainConfig, config.for_batch_size(batch_size))
    return replace(config, **overrides)


def _read(recipe: str | Path) -> Mapping[str, Any]:
    if str(recipe) in recipe_names():
        file: Any = resources.files("evit_ext.training") / "recipes" / f"{recipe}.yaml"
    elif Path(recipe).is_file():
        file = Path(recipe)
        if file.stat().st_size > _LARGEST:
            raise ValueError(f"{recipe} has {file.stat().st_size} bytes, a recipe at most {_LARGEST}")
    else:
        raise FileNotFoundError(
            f"there is no recipe {shown(str(recipe))}: expected one of {', '.join(recipe_names())}, or a "
            "YAML file"
        )
    try:
        values = yaml.safe_load(file.read_text("utf-8"))
    except _NOT_YAML as error:
        mark = getattr(error, "problem_mark", None)
        problem = shortened(getattr(error, "problem", ""))
        said = reason(error) if mark is None else f"line {mark.line + 1}: {problem}"
        text = ", not even text" if isinstance(error, UnicodeDecodeError) else ""
        raise ValueError(f"{recipe} is not YAML{text}: {said}") from error
    if not isinstance(values, Mapping):
        raise ValueError(f"{recipe} must be a mapping of fields to values, got {type(values).__name__}")
    _check_size(values, str(recipe))
    return values


#: Bytes of a recipe, and values in it with those that it repeats; the largest that ships has 40.
_LARGEST = 2**20
_MOST_VALUES = 10_000

#: What comes of reading it; PyYAML has errors of its own for syntax, and Python's for numbers and dates.
_NOT_YAML = (yaml.YAMLError, ArithmeticError, AttributeError, LookupError, RecursionError, ValueError)


def _check_size(values: Any, source: str) -> None:
    """Raise ValueError where aliases of YAML (``*name``) make much of little, or have something in itself."""
    number, waiting = 0, [values]
    while waiting:
        value = waiting.pop()
        number += 1
        if number > _MOST_VALUES:
            raise ValueError(
                f"{source} has more than {_MOST_VALUES} values, with those that its aliases (*name) repeat"
            )
        if isinstance(value, Mapping):
            waiting += value.values()
        elif isinstance(value, (list, tuple, set)):
            waiting += value


def typed(values: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return the values in the types of their fields: an int where a float is meant, a list for a tuple.

    Raises:
        ValueError: there is no such field.
        TypeError: a value of another type.
    """
    hints = typing.get_type_hints(TrainConfig)
    known = [entry.name for entry in fields(TrainConfig)]
    result, unknown, mistyped = {}, [], []
    for name, value in values.items():
        if name not in known:
            near = nearest(str(name)[:100], known)
            unknown.append(f"{source}: there is no field {shown(name)}" + (f"; {near!r}?" if near else ""))
            continue
        try:
            result[name] = as_hinted(value, hints[name])
        except (TypeError, ValueError, OverflowError):
            mistyped.append(f"{source}: {name} must be {_words(hints[name])}, got {shown(value)}")
    if len(mistyped) == 1 and not unknown:
        raise TypeError(mistyped[0])
    raise_problems([*unknown, *mistyped])
    return result


#: What a field takes, in words.
_KINDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text of at most 4096 characters",
}


def _words(hint: Any) -> str:
    """Return what values a type hint allows, in words."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        return f"{' or '.join(_words(kind) for kind in inner if kind is not type(None))} or none"
    if origin is tuple:
        several = "" if inner[-1] is Ellipsis else f"{len(inner)} "
        return f"{several}{_KINDS[inner[0]].removeprefix('a ')}s"
    return "a mapping of names to values" if origin is dict else _KINDS[hint]
