"""timm's pre-norm ``Block`` on the CPU without gradients, as a whole.

What is in it is checked once, and then seven operators run. The calls of its modules, and the checks that
each of them makes for itself, took 6 % of the time at batch 1 (DeiT-S, bfloat16, two cores of AMD's Zen 4).
Sums are added where the products before them are written.

Notation: B batch, N tokens, C channels.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch.nn.functional as F
from timm.layers import Mlp
from timm.models.vision_transformer import Attention, DropPath, LayerScale
from torch import Tensor, nn

from evit_ext import ops
from evit_ext.cpu import forward as cpu_forward
from evit_ext.cpu.forward import Operands, as_written, operands, product
from evit_ext.cpu.replacing import is_replaced
from evit_ext.patching.attention import choose
from evit_ext.patching.families.timm_attention import TIMM_ATTENTION

cpu_forward.remember(LayerScale, DropPath)


class _Layers(NamedTuple):
    """A norm (shape, weight, bias, eps), two linear layers, and a factor of what the second one returns."""

    norm: tuple[Any, ...]
    first: Operands
    second: Operands
    gamma: Tensor | None

    def normed(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, *self.norm)

    def out(self, y: Tensor) -> Tensor:
        """Return the branch, whose second layer gets `y`."""
        return product(y, self.second) if self.gamma is None else product(y, self.second) * self.gamma

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the sum of `x` and the branch, whose second layer gets `y`."""
        return cpu_forward.add_product(x, y, self.second) if self.gamma is None else x + self.out(y)


class AttentionBranch(NamedTuple):
    """Norm, projection, attention and projection."""

    layers: _Layers
    num_heads: int

    def attended(self, x: Tensor, mean: bool = False) -> tuple[Tensor, Tensor]:
        """Return what the heads make of `x` [B, N, C], and the scores of the tokens."""
        qkv = product(self.layers.normed(x), self.layers.first)
        return ops.attention_with_scores(qkv, self.num_heads, mean=mean)


class MlpBranch(NamedTuple):
    """Norm, linear layer, GELU and linear layer."""

    layers: _Layers
    approximate: str

    def hidden(self, x: Tensor, normed: Tensor | None = None) -> Tensor:
        """Return what is between the layers for `x` [B, N, C], whose norm may be known."""
        normed = self.layers.normed(x) if normed is None else normed
        return product(normed, self.layers.first, self.approximate)


def attention_branch(block: Any, x: Tensor) -> AttentionBranch | None:
    """Return what the attention branch of a ``Block`` computes `x` [B, N, C] with.

    It is None if there is more to it, or where the faster code may not run. That the block's own forward is
    timm's is for the caller to know.
    """
    # Modules and parameters are not read as attributes, which takes nn.Module half a microsecond each time.
    attention = block._modules["attn"]
    if type(attention) is not Attention or not cpu_forward.multiplies(x) or cpu_forward.has_tiles(x):
        return None
    if choose(TIMM_ATTENTION, attention, x) != "kernel":
        return None
    inner = attention._modules
    # Older versions of timm have no norm of the attention's output.
    norms = (inner["q_norm"], inner["k_norm"], inner.get("norm"))
    if not all(norm is None or as_written(norm, nn.Identity) for norm in norms):
        return None
    if not _drops_nothing(inner["proj_drop"], nn.Dropout, "p"):
        return None
    layers = _layers(block._modules, "1", inner["qkv"], inner["proj"], x)
    return None if layers is None else AttentionBranch(layers, attention.num_heads)


def mlp_branch(block: Any, x: Tensor) -> MlpBranch | None:
    """Return what the MLP branch of a ``Block`` computes with, as :func:`attention_branch` does."""
    mlp = block._modules["mlp"]
    if type(mlp) is not Mlp or not cpu_forward.may_replace(mlp, x) or not cpu_forward.multiplies(x):
        return None
    if cpu_forward.is_watched(mlp) or not is_replaced(mlp):
        return None
    approximate = cpu_forward.gelu_of_mlp(mlp)
    if approximate is None:
        return None
    layers = _layers(block._modules, "2", mlp._modules["fc1"], mlp._modules["fc2"], x)
    return None if layers is None else MlpBranch(layers, approximate)


def _layers(modules: dict[str, Any], number: str, first: Any, second: Any, x: Tensor) -> _Layers | None:
    """Return the layers of a branch for `x`, or None if there is more to it."""
    norm, scale = modules["norm" + number], modules["ls" + number]
    if type(norm) not in cpu_forward.LAYER_NORMS or not as_written(norm, type(norm)):
        return None
    weight, bias = norm._parameters["weight"], norm._parameters["bias"]
    if any(value is not None and value.dtype != x.dtype for value in (weight, bias)):
        return None
    if not _drops_nothing(modules["drop_path" + number], DropPath, "drop_prob"):
        return None
    gamma = None
    if not as_written(scale, nn.Identity):
        gamma = scale._parameters["gamma"] if as_written(scale, LayerScale) and not scale.inplace else None
        if gamma is None or gamma.dtype != x.dtype:
            return None
    one, other = operands(first, x), operands(second, x)
    if one is None or other is None:
        return None
    return _Layers((norm.normalized_shape, weight, bias, norm.eps), one, other, gamma)


def _drops_nothing(module: Any, kind: type[nn.Module], probability: str) -> bool:
    """Return whether a module is a dropout of a kind that drops nothing now, or the identity."""
    if as_written(module, kind):
        return not (module.training and getattr(module, probability))
    return as_written(module, nn.Identity)


def block_forward(block: Any, x: Tensor, *arguments: Any, **named: Any) -> Tensor:
    """Return the output of timm's ``Block`` of `x` [B, N, C], on the CPU as a whole where that is right.

    Other arguments are those of timm's block.
    """
    masked = arguments or any(value is not None and value is not False for value in named.values())
    if not masked and cpu_forward.may_replace(block, x):
        attention, mlp = attention_branch(block, x), mlp_branch(block, x)
        if attention is not None and mlp is not None:
            x = attention.layers.add(x, attention.attended(x)[0])
            return mlp.layers.add(x, mlp.hidden(x))
    out: Tensor = type(block).forward(block, x, *arguments, **named)
    return out
