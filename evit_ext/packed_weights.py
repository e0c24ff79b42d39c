"""Weights of linear layers in oneDNN's own layout, kept for layers that :func:`evit_ext.prepack` names."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

#: Puts a weight into the layout that oneDNN multiplies by fastest; None where torch lacks it.
_reorder: Any = getattr(torch.ops.mkldnn, "_reorder_linear_weight", None)


class _Packed:
    """A layer's weight in oneDNN's layout, and what it was when it was put there."""

    def __init__(self) -> None:
        # The tensor is kept so that no other comes to lie at its address. Replaced as a whole, for threads.
        self._last: tuple[Tensor, tuple[int, int], Tensor] | None = None
        #: Steps of optimizers that had the weight.
        self.steps = 0

    def of(self, weight: Tensor) -> Tensor:
        """Return `weight` in oneDNN's layout, put there anew where it is not what it was."""
        version = weight._version, self.steps
        if self._last is not None:
            source, packed_version, packed = self._last
            if version == packed_version and _same_memory(source, weight):
                return packed
        source = weight.detach()
        packed = _reorder(source)
        self._last = source, version, packed
        return packed


def _same_memory(one: Tensor, other: Tensor) -> bool:
    return one.data_ptr() == other.data_ptr() and (one.dtype, one.shape, one.stride()) == (
        other.dtype,
        other.shape,
        other.stride(),
    )


#: The layers that keep a second copy of their weights. Not an attribute of theirs: it is opaque to pickle,
#: copies and state dicts.
_PACKED: WeakKeyDictionary[nn.Module, _Packed] = WeakKeyDictionary()


def keep(layers: Iterable[nn.Module]) -> None:
    """Let layers keep their weights packed."""
    _watch_optimizers()
    for layer in layers:
        _PACKED.setdefault(layer, _Packed())


def let_go(layers: Iterable[nn.Module]) -> None:
    """Let layers no longer do so."""
    for layer in layers:
        _PACKED.pop(layer, None)


@cache
def _watch_optimizers() -> None:
    """From now on, count the steps of optimizers: fused ones do not count as changes."""
    register_optimizer_step_post_hook(_count_step)


def _count_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if torch.compiler.is_compiling():
        return  # a compiled step is counted by PyTorch, and may not be broken by this
    stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for layer, packed in list(_PACKED.items()):
        if id(layer._parameters.get("weight")) in stepped:
            packed.steps += 1


def weight_of(layer: nn.Linear) -> Tensor:
    """Return a layer's weight, packed if it keeps it so, for oneDNN's product and nothing else."""
    packed = _PACKED.get(layer)
    # A tensor made in inference mode does not count its changes.
    if packed is None or _reorder is None or layer.weight.is_inference():
        return layer.weight
    return packed.of(layer.weight)
