"""What the classes of a model are called."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from timm.data import ImageNetInfo
from timm.data.imagenet_info import infer_imagenet_subset
from timm.utils.misc import natural_key
from torch import Tensor

from evit_ext.data.images import find_split


class NamedProbability(NamedTuple):
    """A class and how probable the model finds it."""

    name: str
    probability: float


def imagenet_names(num_classes: int) -> list[str] | None:
    """Return ImageNet's names where the number of classes is that of ImageNet-1k or another of its subsets
    that timm knows; None for other numbers."""
    subset = infer_imagenet_subset({"num_classes": num_classes})
    if subset is None:
        return None
    info = ImageNetInfo(subset)
    # "tench, Tinca tinca" has the Latin name, too.
    return [info.index_to_description(number).split(",")[0] for number in range(num_classes)]


def read_class_names(path: str | Path, num_classes: int) -> list[str]:
    """Read the names of classes from a text file, UTF-8, a line for each class in order.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no text, or does not have `num_classes` lines.
    """
    try:
        names = Path(path).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be a text file with a class a line, in UTF-8: {error}") from error
    if len(names) != num_classes:
        raise ValueError(f"{path} must have a line for each of {num_classes} classes, got {len(names)} lines")
    return names


def most_probable(
    probabilities: Tensor | None, names: Sequence[str] | None, most: int = 5
) -> list[NamedProbability]:
    """Return the `most` probable classes, best first; none where `probabilities`, [classes], is None.

    Without `names`, classes are called by their numbers, from 0.
    """
    if probabilities is None:
        return []
    best = probabilities.topk(min(most, len(probabilities)))
    return [
        NamedProbability(f"class {number}" if names is None else names[number], value)
        for number, value in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]


def folder_names(data: str, split: str, num_classes: int) -> list[str] | None:
    """Return the names of the classes' folders of a data set, in the order in which timm numbers them.

    ImageNet's numbers are replaced by its names. None where there are not `num_classes` folders, or the data
    set is no longer there.
    """
    try:
        root = find_split(data, split)
    except (FileNotFoundError, ValueError):
        return None
    if not root.is_dir():
        return None
    names = sorted((entry.name for entry in root.iterdir() if entry.is_dir()), key=natural_key)
    if len(names) != num_classes:
        return None
    subset = infer_imagenet_subset({"num_classes": num_classes})
    if subset is not None and (info := ImageNetInfo(subset)).label_names() == names:
        return [info.label_name_to_description(name).split(",")[0] for name in names]
    return names
