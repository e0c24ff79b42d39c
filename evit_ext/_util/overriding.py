"""Overriding methods of a single module, and undoing it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn


class Override:
    """A method of one module that overrides its class's, stored as an attribute of the module.

    It is an object rather than a function, so that a copy of the module, or a saved and loaded one, gets its
    own override that refers to the copy.

    Args:
        module: the module. The override holds a reference to it, as a bound method does, so Python frees a
            module with overrides only at garbage collection.
        name: name of the method.
    """

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module = module
        self.name = name
        #: The module's own attribute of that name, which some libraries set.
        self.replaced: Callable[..., Any] | None = module.__dict__.get(name)

    def original(self) -> Callable[..., Any]:
        """Return the overridden method, bound to the module."""
        if self.replaced is not None:
            return self.replaced
        return partial(getattr(type(self.module), self.name), self.module)

    def named(self, *arguments: Any, **others: Any) -> dict[str, Any]:
        """Return the arguments of a call by their names, as the class's method has them, without defaults.

        Raises:
            TypeError: they are none that it takes.
        """
        method = inspect.signature(getattr(type(self.module), self.name))
        return dict(method.bind(self.module, *arguments, **others).arguments)

    def install(self) -> None:
        """Override the method."""
        setattr(self.module, self.name, self)


def overrides(module: nn.Module) -> list[Override]:
    """Return the active overrides of `module`.

    An override that other code has wrapped and stored under another name is not included.
    """
    named = module.__dict__.items()
    return [value for name, value in named if isinstance(value, Override) and value.name == name]


def remove_overrides(module: nn.Module) -> None:
    """Remove all overrides of `module`."""
    for override in overrides(module):
        delattr(module, override.name)
        if override.replaced is not None:
            setattr(module, override.name, override.replaced)


class ReplicateOverrides(Override):
    """Overrides ``_replicate_for_data_parallel``, with which nn.DataParallel makes its replicas.

    The original copies attributes as they are, so a replica's overrides would act on the original module.
    """

    def __call__(self) -> nn.Module:
        """Return a replica with its own overrides."""
        replica: nn.Module = self.original()()
        for override in overrides(self.module):
            of_replica = type(override)(replica, override.name)
            of_replica.replaced = override.replaced
            replica.__dict__[override.name] = of_replica
        return replica
