"""Methods of one model that are put in the place of its class's, and taken away again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


class Override:
    """A method of one module instead of its class's, as an attribute of the module.

    An object rather than a function, so that a copy of the module, or one that was saved and loaded, has its
    own, with the copy in the place of the module.

    Args:
        module: the module.
        name: of the method.
    """

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module = module
        self.name = name

    def original(self) -> Callable[..., Any]:
        """Return the method of the class, bound to the module."""
        return getattr(type(self.module), self.name).__get__(self.module)


def remove_overrides(module: nn.Module) -> None:
    """Take all overrides of `module` away."""
    for name, value in list(module.__dict__.items()):
        if isinstance(value, Override):
            delattr(module, name)


class ReplicateOverrides(Override):
    """In the place of ``_replicate_for_data_parallel``, which nn.DataParallel makes its replicas by.

    That copies attributes as they are, so that the overrides of a replica would work on the model it is of.
    """

    def __call__(self) -> nn.Module:
        """Return a replica with overrides of its own."""
        replica: nn.Module = self.original()()
        for name, value in self.module.__dict__.items():
            if isinstance(value, Override):
                replica.__dict__[name] = type(value)(replica, value.name)
        return replica
