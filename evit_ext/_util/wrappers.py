"""Modules that wrap another one, as torch's activation checkpointing, compiler, FSDP and DDP do."""

from __future__ import annotations

from torch import nn

#: Where wrappers keep the module they wrap.
WRAPPED = ("_checkpoint_wrapped_module", "_orig_mod", "_fsdp_wrapped_module", "module")


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the module inside all wrappers around it."""
    while True:
        names = (name for name in WRAPPED if module._modules.get(name) is not None)
        name = next(names, None)
        if name is None:
            return module
        module = module._modules[name]  # type: ignore[assignment]
