"""Weights in oneDNN's own layout, kept for the linear layers that :func:`evit_ext.prepack` chooses."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

#: Converts a weight to the layout that oneDNN multiplies fastest; None if torch lacks it.
_reorder: Any = getattr(torch.ops.mkldnn, "_reorder_linear_weight", None)


class _Packed:
    """A layer's weight in oneDNN's layout, and what it was made from."""

    def __init__(self) -> None:
        # Keeping the source tensor reserves its address. The tuple is replaced as a whole, for thread safety.
        self._last: tuple[tuple[object, ...], Tensor, Tensor] | None = None
        #: Number of optimizer steps that may have changed the weight.
        self.steps = 0
        self._warned = False

    def warn(self) -> None:
        """Say, once, that the weight cannot be packed."""
        if not self._warned:
            self._warned = True
            warnings.warn(
                "evit_ext.prepack has no effect on weights that were made in torch.inference_mode(), as "
                "PyTorch does not count their changes: build and convert the model outside of it",
                stacklevel=3,
            )

    def of(self, weight: Tensor) -> Tensor:
        """Return `weight` in oneDNN's layout, converting it again if it has changed."""
        shape, stride = weight.shape, weight.stride()
        state = weight.data_ptr(), weight._version, self.steps, weight.dtype, shape, stride
        if self._last is not None and state == self._last[0]:
            return self._last[2]
        source = weight.detach()
        packed = _reorder(source)
        self._last = state, source, packed
        return packed


#: The layers that keep a second copy of their weights. The copy is not an attribute of the layer, because it
#: is opaque to pickle, copies and state dicts.
_PACKED: WeakKeyDictionary[nn.Module, _Packed] = WeakKeyDictionary()


def keep(layers: Iterable[nn.Module]) -> None:
    """Start keeping packed weights for these layers."""
    _watch_optimizers()
    for layer in layers:
        _PACKED.setdefault(layer, _Packed())


def discard(layers: Iterable[nn.Module]) -> None:
    """Stop keeping packed weights for these layers."""
    for layer in layers:
        _PACKED.pop(layer, None)


@cache
def _watch_optimizers() -> None:
    """Count optimizer steps from now on: fused optimizers do not change a weight's version."""
    register_optimizer_step_post_hook(_count_step)


def _count_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if torch.compiler.is_compiling():
        return  # PyTorch counts changes by a compiled step, and this must not break its graph
    stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for layer, packed in list(_PACKED.items()):
        if id(layer._parameters.get("weight")) in stepped:
            packed.steps += 1


def weight_of(layer: nn.Module, weight: Tensor) -> Tensor:
    """Return a layer's `weight`, packed if that is kept; only for use in oneDNN's product."""
    if not _PACKED or (packed := _PACKED.get(layer)) is None or _reorder is None:
        return weight
    if weight.is_inference():  # it has no version to notice changes by
        packed.warn()
        return weight
    return packed.of(weight)
