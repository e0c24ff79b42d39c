"""timm's pre-norm ``Block`` on the CPU without gradients, as a whole.

What is in it is checked once, and then seven operators run. The calls of its modules, and the checks that
each of them makes for itself, took a tenth of the time at batch 1 (DeiT-S, bfloat16, two cores of AMD's Zen
4; docs/kernels.md).
Sums are added where the products before them are written.

Notation: B batch, N tokens, C channels.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from timm.models.vision_transformer import Attention, DropPath, LayerScale
from torch import Tensor, nn

from evit_ext import ops
from evit_ext.cpu import forward as cpu_forward
from evit_ext.cpu.forward import add_product, as_written, fits, product, weights
from evit_ext.cpu.known import keep, recall
from evit_ext.cpu.replacing import is_replaced
from evit_ext.patching.attention import choose
from evit_ext.patching.families.timm_attention import TIMM_ATTENTION

cpu_forward.remember(LayerScale, DropPath)


class _Layers(NamedTuple):
    """A norm (shape, weight, bias, eps), two linear layers, and a factor of what the second one returns."""

    dtype: torch.dtype
    norm: tuple[Any, ...]
    first: nn.Linear
    second: nn.Linear
    gamma: Tensor | None

    def normed(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, *self.norm)

    def projected(self, x: Tensor, approximate: str | None = None) -> Tensor:
        """Return what the first layer makes of `x`."""
        return product(x, weights(self.first), approximate)

    def out(self, y: Tensor) -> Tensor:
        """Return the branch, whose second layer gets `y`."""
        out = product(y, weights(self.second))
        return out if self.gamma is None else out * self.gamma

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the sum of `x` and the branch, whose second layer gets `y`."""
        return x + self.out(y) if self.gamma is not None else add_product(x, y, weights(self.second))


class AttentionBranch(NamedTuple):
    """Norm, projection, attention and projection."""

    layers: _Layers
    num_heads: int

    def attended(self, x: Tensor, mean: bool = False) -> tuple[Tensor, Tensor]:
        """Return what the heads make of `x` [B, N, C], and the scores of the tokens."""
        qkv = self.layers.projected(self.layers.normed(x))
        return ops.attention_with_scores(qkv, self.num_heads, mean=mean)


class MlpBranch(NamedTuple):
    """Norm, linear layer, GELU and linear layer."""

    layers: _Layers
    approximate: str

    def hidden(self, x: Tensor, normed: Tensor | None = None) -> Tensor:
        """Return what is between the layers for `x` [B, N, C], whose norm may be known."""
        normed = self.layers.normed(x) if normed is None else normed
        return self.layers.projected(normed, self.approximate)


def attention_branch(block: Any, x: Tensor) -> AttentionBranch | None:
    """Return what the attention branch of a ``Block`` computes `x` [B, N, C] with.

    It is None if there is more to it, or where the faster code may not run. That the block's own forward is
    timm's is for the caller to know.
    """
    if not cpu_forward.runs_on(x) or not cpu_forward.multiplies(x) or cpu_forward.has_tiles(x):
        return None
    known: AttentionBranch | None = recall(block, "attention")
    if known is not None and known.layers.dtype is x.dtype:
        return known
    attention = block.attn
    if type(attention) is not Attention or choose(TIMM_ATTENTION, attention, x) != "kernel":
        return None
    # Older versions of timm have no norm of the attention's output, and no gate.
    if getattr(attention, "gate", None) is not None:
        return None
    norms = (attention.q_norm, attention.k_norm, getattr(attention, "norm", None))
    if not all(norm is None or as_written(norm, nn.Identity) for norm in norms):
        return None
    if not _drops_nothing(attention.proj_drop, nn.Dropout, "p"):
        return None
    layers = _layers(block.norm1, attention.qkv, attention.proj, block.ls1, block.drop_path1, x)
    if layers is None:
        return None
    found = AttentionBranch(layers, attention.num_heads)
    keep(block, "attention", [block.norm1, attention, block.ls1, block.drop_path1], found)
    return found


def mlp_branch(block: Any, x: Tensor) -> MlpBranch | None:
    """Return what the MLP branch of a ``Block`` computes with, as :func:`attention_branch` does."""
    if not cpu_forward.runs_on(x) or not cpu_forward.multiplies(x):
        return None
    known: MlpBranch | None = recall(block, "mlp")
    if known is not None and known.layers.dtype is x.dtype:
        return known
    mlp = block.mlp
    if type(mlp) is not Mlp or cpu_forward.is_watched(mlp) or not is_replaced(mlp):
        return None
    approximate = cpu_forward.gelu_of_mlp(mlp) if cpu_forward.may_replace(mlp, x) else None
    if approximate is None:
        return None
    layers = _layers(block.norm2, mlp.fc1, mlp.fc2, block.ls2, block.drop_path2, x)
    if layers is None:
        return None
    found = MlpBranch(layers, approximate)
    keep(block, "mlp", [block.norm2, mlp, block.ls2, block.drop_path2], found)
    return found


def _layers(norm: Any, first: Any, second: Any, scale: Any, drop_path: Any, x: Tensor) -> _Layers | None:
    """Return the layers of a branch for `x`, or None if there is more to it."""
    if type(norm) not in cpu_forward.LAYER_NORMS or not as_written(norm, type(norm)):
        return None
    if any(value is not None and value.dtype != x.dtype for value in (norm.weight, norm.bias)):
        return None
    if not _drops_nothing(drop_path, DropPath, "drop_prob"):
        return None
    gamma = None
    if not as_written(scale, nn.Identity):
        gamma = scale.gamma if as_written(scale, LayerScale) and not scale.inplace else None
        if gamma is None or gamma.dtype != x.dtype:
            return None
    if not fits(first, x) or not fits(second, x):
        return None
    if first.weight.shape[1] != x.shape[2] or second.weight.shape[0] != x.shape[2]:
        return None
    return _Layers(x.dtype, (norm.normalized_shape, norm.weight, norm.bias, norm.eps), first, second, gamma)


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
