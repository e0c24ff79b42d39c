"""What classes are called, and how the names of data and model find each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# This many names are told in a message; of more, the number.
_TOLD = 8


def read_class_names(path: str | Path, num_classes: int | None = None, exact: bool = False) -> list[str]:
    """Read the names of classes from a text file, UTF-8 with or without a BOM, a line for each in order.

    Args:
        path: of the file.
        num_classes: how many lines are expected; None takes any number.
        exact: keep spaces around a name, which the folder of a class may have.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no text, does not have `num_classes` lines, or has an empty line or a name twice.
    """
    try:
        names = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be a text file with a class a line, in UTF-8: {error}") from error
    names = names if exact else [name.strip() for name in names]
    if num_classes is not None and len(names) != num_classes:
        raise ValueError(f"{path} must have a line for each of {num_classes} classes, got {len(names)} lines")
    if "" in names:
        raise ValueError(f"{path} must have a class on each line, line {names.index('') + 1} is empty")
    return names


def match_classes(
    data: Mapping[str, int], known: Sequence[str], of_data: str, of_model: str
) -> dict[int, int]:
    """Return the model's number for each number of the data's classes, matched by name.

    Args:
        data: the data's number of every class by name.
        known: the names of the model's classes, in order.
        of_data, of_model: what has them, for the message.

    Raises:
        ValueError: the data has a class that the model does not know; all of them are named.
    """
    numbers = {name: number for number, name in enumerate(known)}
    unknown = [name for name in data if name not in numbers]
    if unknown:
        unused = [name for name in known if name not in data]
        raise ValueError(
            f"{of_data} has {_listed(unknown)}, which {of_model} does not know"
            + (f"; it knows {_listed(unused)}, which the data does not have" if unused else "")
            + ". Classes are matched by name: rename the folders"
        )
    return {label: numbers[name] for name, label in data.items()}


def missing_classes(data: Mapping[str, int], known: Sequence[str]) -> str:
    """Return in words which of the known classes the data does not have; "" if it has all."""
    missing = [name for name in known if name not in data]
    return _listed(missing) if missing else ""


def weights_class_names(num_classes: int, names: Sequence[str]) -> list[str] | None:
    """Return the names by which published weights know their classes, if data uses the same ones.

    Args:
        num_classes: of the weights; ImageNet's subsets have a number each.
        names: of the data's classes, such as ImageNet's "n01440764".

    Returns:
        The names in the order of the weights' classes; None if they are not those of `names`.
    """
    info = _imagenet(num_classes)
    if info is None:
        return None
    known = list(info.label_names())
    return known if set(names) <= set(known) else None


def imagenet_names(num_classes: int) -> list[str] | None:
    """Return ImageNet's names where the number of classes is that of ImageNet-1k or another of its subsets
    that timm knows; None for other numbers."""
    info = _imagenet(num_classes)
    if info is None:
        return None
    # "tench, Tinca tinca" has the Latin name, too.
    return [info.index_to_description(number).split(",")[0] for number in range(num_classes)]


def names_for_people(names: Sequence[str]) -> list[str]:
    """Return the names of classes as people know them: ImageNet's numbers are replaced by its words."""
    info = _imagenet(len(names))
    if info is not None and info.label_names() == list(names):
        return [info.label_name_to_description(name).split(",")[0] for name in names]
    return list(names)


def _imagenet(num_classes: int) -> Any:
    """Return timm's ImageNetInfo of the subset with so many classes; None if there is none."""
    from timm.data import ImageNetInfo  # here, because it brings torch, which takes seconds
    from timm.data.imagenet_info import infer_imagenet_subset

    subset = infer_imagenet_subset({"num_classes": num_classes})
    return None if subset is None else ImageNetInfo(subset)


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _TOLD} more" if len(names) > _TOLD else ""
    return ("the class " if len(names) == 1 else "the classes ") + ", ".join(names[:_TOLD]) + more
