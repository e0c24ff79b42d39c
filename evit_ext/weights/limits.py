"""A limit to what building a model may take, by what its weights take."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

#: What is always allowed: 128 MiB of float32, for buffers that are not saved, and small models.
_ELEMENTS = 2**25
_OPERATIONS = 5_000
_NUMBERS = ("arange", "linspace", "logspace")


class TooLarge(ValueError):
    """A model became larger than its weights."""


@contextmanager
def no_larger_than(weights: Path) -> Iterator[None]:
    """Have a model that is built in the context be one that the weights can be of.

    A configuration of a few bytes may ask for a million blocks. Here, each tensor's size is known before its
    memory is spent, and what all take together is at most a few times what the file has.

    Args:
        weights: a safetensors file, of which only the header is read.

    Raises:
        TooLarge: the model takes more.
        ValueError: the file is damaged.
    """
    try:
        with safe_open(weights, "pt") as file:
            sizes = [math.prod(file.get_slice(key).get_shape()) for key in file.keys()]  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{weights} is not complete, or damaged: {error}") from error
    with _Limit(len(sizes), sum(sizes)):
        yield


class _Limit(TorchDispatchMode):
    """Counts operations, and the elements of the tensors that they make, before they are made.

    timm's models take 4 to 8 operations for each of their tensors, and make few that they do not keep.
    """

    def __init__(self, tensors: int, elements: int) -> None:
        super().__init__()
        self._has = f"the weights have {elements:,} numbers in {tensors} tensors"
        self._most_elements = 2 * elements + _ELEMENTS
        self._most_operations = 40 * tensors + _OPERATIONS
        self._elements = self._operations = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        tensors = [value for value in args if isinstance(value, Tensor)]
        elements = _size(func, args, tensors)
        self._operations += 1
        self._elements += 0 if tensors else elements
        if self._operations > self._most_operations or max(elements, self._elements) > self._most_elements:
            raise TooLarge(f"it is many times as large as its weights: {self._has}")
        return func(*args, **(kwargs or {}))


def _size(func: Callable[..., Any], args: tuple[Any, ...], tensors: list[Tensor]) -> int:
    """Return about how many elements the result of an operator of torch has at most."""
    if tensors:
        try:
            size = math.prod(torch.broadcast_shapes(*(value.shape for value in tensors)))
            return size * math.prod(args[1]) if "repeat" in str(func) else size
        except (RuntimeError, TypeError):  # of a matrix product, for instance
            return 0
    if args and isinstance(args[0], (list, tuple)):
        return math.prod(abs(size) for size in args[0] if isinstance(size, int))
    if any(name in str(func) for name in _NUMBERS):
        return int(max((abs(value) for value in args if isinstance(value, (int, float))), default=0))
    return 0
