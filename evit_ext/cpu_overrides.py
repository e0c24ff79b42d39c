"""Attentions and MLPs of timm's blocks made to compute on the CPU as :mod:`evit_ext.cpu_inference` does."""

from __future__ import annotations

from typing import Any

from timm.layers import Mlp
from torch import Tensor, nn

from evit_ext import cpu_inference
from evit_ext.attention import attend
from evit_ext.cpu_inference import CpuForward
from evit_ext.override import Override, ReplicateOverrides, remove_overrides


class CpuAttention(CpuForward):
    """In the place of the ``forward`` of timm's attentions."""

    def __call__(self, x: Tensor, *arguments: Any, **named: Any) -> Tensor:
        """Return the attention of `x` [B, N, C]; further arguments are the attention's own."""
        # No mask, no positions; False is that of is_causal.
        plain = not arguments and all(value is None or value is False for value in named.values())
        if plain and cpu_inference.attends(self.module, x):
            return attend(self.module, x)[0]
        out: Tensor = self.original()(x, *arguments, **named)
        return out


class CpuMlp(CpuForward):
    """In the place of the ``forward`` of timm's ``Mlp``."""

    def __call__(self, x: Tensor) -> Tensor:
        """Return the MLP of `x` [B, N, C]."""
        out = cpu_inference.mlp(self.module, x)
        return self.original()(x) if out is None else out


def install(blocks: nn.Module, attentions: tuple[type[nn.Module], ...]) -> None:
    """Put the overrides in the place of the forwards of timm's attentions and MLPs in `blocks`.

    Args:
        blocks: of a model.
        attentions: classes of attentions that take ``attend``. Compared exactly, as a subclass is free to
            compute something else.
    """
    for block in blocks.children():
        _override(getattr(block, "attn", None), attentions, CpuAttention)
        _override(getattr(block, "mlp", None), (Mlp,), CpuMlp)


def _override(module: Any, kinds: tuple[type[nn.Module], ...], override: type[Override]) -> None:
    if type(module) in kinds and "forward" not in module.__dict__:
        override(module, "forward").install()
        ReplicateOverrides(module, "_replicate_for_data_parallel").install()


def uninstall(blocks: nn.Module) -> None:
    """Undo :func:`install`."""
    for block in blocks.children():
        for module in (getattr(block, "attn", None), getattr(block, "mlp", None)):
            if isinstance(module, nn.Module):
                remove_overrides(module)
