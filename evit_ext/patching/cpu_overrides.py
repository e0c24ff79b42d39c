"""Makes attentions and MLPs of timm's blocks run :mod:`evit_ext.cpu.forward` on the CPU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from evit_ext._util.overriding import ReplicateOverrides, remove_overrides
from evit_ext.cpu import forward as cpu_forward
from evit_ext.cpu.forward import CpuForward
from evit_ext.patching.attention import attend


class CpuAttention(CpuForward):
    """Overrides the ``forward`` of timm's attentions."""

    def __call__(self, x: Tensor, *arguments: Any, **named: Any) -> Tensor:
        """Return the attention of `x` [B, N, C]; other arguments are those of timm's attention."""
        rope = named.get("rope")
        # No mask and no bias; is_causal may be passed as False.
        plain = not arguments and all(v is None or v is False for name, v in named.items() if name != "rope")
        if plain and cpu_forward.may_attend(self.module, x):
            return attend(self.module, x, rope=rope)[0]
        out: Tensor = self.original()(x, *arguments, **named)
        return out


class CpuMlp(CpuForward):
    """Overrides the ``forward`` of timm's ``Mlp``."""

    def __call__(self, x: Tensor) -> Tensor:
        """Return the MLP of `x` [B, N, C]."""
        out = cpu_forward.mlp(self.module, x) if cpu_forward.may_replace(self.module, x) else None
        return self.original()(x) if out is None else out


def install(blocks: nn.Module, forwards: Mapping[type[nn.Module], type[CpuForward]]) -> None:
    """Install overrides of forwards.

    Args:
        blocks: the blocks of a model.
        forwards: the override by class of attention or MLP. Classes are compared exactly, as a subclass is
            free to compute something else.
    """
    for block in blocks.children():
        for module in block.children():
            override = forwards.get(type(module))
            if override is not None and "forward" not in module.__dict__:
                override(module, "forward").install()
                ReplicateOverrides(module, "_replicate_for_data_parallel").install()


def set_active(blocks: nn.Module, active: bool) -> None:
    """Activate the overrides that :func:`install` installed, or make them call the original forwards."""
    for block in blocks.children():
        for module in block.children():
            override = module.__dict__.get("forward")
            if isinstance(override, CpuForward):
                override.active = active


def uninstall(blocks: nn.Module) -> None:
    """Undo :func:`install`, for :func:`evit_ext.remove`."""
    for block in blocks.children():
        for module in block.children():
            remove_overrides(module)
