"""Replacing the forward of attentions and MLPs by a faster one, and undoing it.

A replacement is a ``functools.partial`` of a function and the module, stored as the module's own ``forward``:
copies and saved models get one of their own, and torch.compile makes one graph for all blocks of a kind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from torch import nn

from evit_ext.cpu.forward import ACTIVE
from evit_ext.cpu.known import forget

#: A forward that takes the module first.
Forward = Callable[..., Any]


def replace(modules: Iterable[nn.Module], forwards: Mapping[type[nn.Module], Forward]) -> None:
    """Replace the forwards of modules, not active yet.

    Args:
        modules: such as all in the blocks of a model. A forward that a module has of its own stays.
        forwards: the new forward by class. Classes are compared exactly, as a subclass is free to compute
            something else.
    """
    for module in modules:
        forward = forwards.get(type(module))
        if forward is not None and "forward" not in module.__dict__:
            module.forward = partial(forward, module)
            module._replicate_for_data_parallel = partial(_replicate, module)  # type: ignore[method-assign]
            module.__dict__[ACTIVE] = False


def set_active(modules: Iterable[nn.Module], active: bool) -> None:
    """Let the forwards that :func:`replace` installed run the faster code, or the original one."""
    for module in modules:
        if ACTIVE in module.__dict__:
            module.__dict__[ACTIVE] = active
        if not active:
            forget(module)


def restore(modules: Iterable[nn.Module]) -> None:
    """Undo :func:`replace`."""
    for module in modules:
        forget(module)
        if module.__dict__.pop(ACTIVE, None) is None:
            continue
        for name in ("forward", "_replicate_for_data_parallel"):
            if _is_replacement(module.__dict__.get(name), module):
                delattr(module, name)


def is_replaced(module: nn.Module) -> bool:
    """Return whether the forward of `module` is its class's, or one of :func:`replace`."""
    return "forward" not in module.__dict__ or _is_replacement(module.__dict__["forward"], module)


def _is_replacement(value: Any, module: nn.Module) -> bool:
    return (
        isinstance(value, partial) and bool(value.args) and value.args[0] is module and _is_ours(value.func)
    )


def _is_ours(function: Any) -> bool:
    return str(getattr(function, "__module__", "")).startswith("evit_ext.")


def _replicate(module: nn.Module) -> nn.Module:
    """Return a replica for nn.DataParallel, whose forward is bound to it and not to `module`."""
    replica: nn.Module = type(module)._replicate_for_data_parallel(module)
    for name, value in module.__dict__.items():
        if _is_replacement(value, module):
            replica.__dict__[name] = partial(value.func, replica)
    return replica
