"""Methods of one model that are put in the place of its class's, and taken away again."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn


class Override:
    """A method of one module instead of its class's, as an attribute of the module.

    An object rather than a function, so that a copy of the module, or one that was saved and loaded, has its
    own, with the copy in the place of the module.

    Args:
        module: the module. It is kept, as a bound method keeps its object; so a module with overrides goes by
            Python's garbage collector, not at once.
        name: of the method.
    """

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module = module
        self.name = name
        #: What the module had of its own under that name, as some libraries put there.
        self.replaced: Callable[..., Any] | None = module.__dict__.get(name)

    def original(self) -> Callable[..., Any]:
        """Return the method that is overridden, bound to the module."""
        if self.replaced is not None:
            return self.replaced
        return partial(getattr(type(self.module), self.name), self.module)

    def install(self) -> None:
        """Put this in the place of the method."""
        setattr(self.module, self.name, self)


def overrides(module: nn.Module) -> list[Override]:
    """Return the overrides of `module` that are in the place of a method.

    Not those that somebody keeps elsewhere, having put a wrapper of theirs in that place.
    """
    named = module.__dict__.items()
    return [value for name, value in named if isinstance(value, Override) and value.name == name]


def remove_overrides(module: nn.Module) -> None:
    """Take all overrides of `module` away."""
    for override in overrides(module):
        delattr(module, override.name)
        if override.replaced is not None:
            setattr(module, override.name, override.replaced)


class ReplicateOverrides(Override):
    """In the place of ``_replicate_for_data_parallel``, which nn.DataParallel makes its replicas by.

    That copies attributes as they are, so that the overrides of a replica would work on the model it is of.
    """

    def __call__(self) -> nn.Module:
        """Return a replica with overrides of its own."""
        replica: nn.Module = self.original()()
        for override in overrides(self.module):
            of_replica = type(override)(replica, override.name)
            of_replica.replaced = override.replaced
            replica.__dict__[override.name] = of_replica
        return replica
