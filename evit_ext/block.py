"""The transformer block that reorganises tokens between its attention and its MLP.

Notation: B batch, H heads, N tokens, P prefix tokens, K kept patches, C channels, D channels a head.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm
from timm.models.vision_transformer import Attention, Block
from torch import Tensor, nn

from evit_ext import ops
from evit_ext.ops import checks

if TYPE_CHECKING:
    from evit_ext.record import TokenRecord


def attend(attention: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Run timm's `Attention` on `x` and also return how much the class token attends to every token.

    The output is that of ``attention(x)``; attention always goes through scaled_dot_product_attention, so no
    N × N map is formed. Hooks on `attention` itself do not run, those on its projections do.

    Args:
        attention: a timm ``Attention``, with or without qk-norm, output norm and gate.
        x: normalised tokens [B, N, C], the class token first.

    Returns:
        The attention's output [B, N, C] and the scores [B, N], float32 (float64 for float64), which sum to 1.
    """
    batch, num_tokens, _ = x.shape
    num_heads, head_dim = attention.num_heads, attention.head_dim
    # The gate and the output norm are younger than the oldest timm that is supported.
    gate, norm = getattr(attention, "gate", None), getattr(attention, "norm", None)
    qkv = attention.qkv(x).reshape(batch, num_tokens, 3, num_heads, head_dim)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # [B, H, N, D] each, views of qkv
    q, k = attention.q_norm(q), attention.k_norm(k)
    dropout = attention.attn_drop.p if attention.training else 0.0
    out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
    scores = ops.class_attention(q[:, :, 0], k)
    out = out.transpose(1, 2).reshape(batch, num_tokens, num_heads * head_dim)
    if norm is not None:
        out = norm(out)
    if gate is not None:
        out = out * gate(x).sigmoid()
    return attention.proj_drop(attention.proj(out)), scores


#: What can be reorganised: for each block class, the attention classes it may hold and how to run them. The
#: classes are compared exactly, because a subclass is free to compute something else.
SUPPORTED: dict[type[nn.Module], dict[type[nn.Module], Callable[[Any, Tensor], tuple[Tensor, Tensor]]]] = {
    Block: {Attention: attend},
}


#: The attributes in which nn.Module keeps its hooks.
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


#: Norms that compute F.layer_norm of their weight, bias and eps. Compared exactly, as above.
_LAYER_NORMS = (nn.LayerNorm, LayerNorm)


def _can_reorganize_and_norm_at_once(norm: nn.Module, x: Tensor, branch: Tensor) -> bool:
    """Return whether `ops.add_reorganize_norm` may take the place of sum, reorganisation and `norm`.

    That is, whether it computes the same, and nobody wants to see the norm being called.
    """
    # An operator for inference. Grad mode alone decides, not whether a tensor requires grad.
    if torch.is_grad_enabled() or type(norm) not in _LAYER_NORMS:
        return False
    # Somebody's hooks, or a forward put in place of the class's, as some libraries do.
    watched = any(getattr(norm, hooks) for hooks in _HOOKS) or torch.nn.modules.module._has_any_global_hook()
    if watched or "forward" in norm.__dict__:
        return False
    if checks.autocast_enabled(x.device.type):  # under which LayerNorm runs in float32
        return False
    same_dtype = all(t is None or t.dtype == x.dtype for t in (branch, norm.weight, norm.bias))
    return same_dtype and norm.normalized_shape == (x.shape[2],)


class ReorganizingBlock(nn.Module):
    """A pre-norm transformer block that keeps the patches the class token attends to most.

    Computes, with the submodules of the block it replaces, ``x + attn(norm1(x))``, then
    :func:`evit_ext.ops.reorganize_tokens`, then ``x + mlp(norm2(x))`` (Liang et al., ICLR 2022, section 3).
    Where every patch would be kept, it computes what the replaced block computes. Without gradients, the sum,
    the reorganisation and ``norm2`` are one operator, :func:`evit_ext.ops.add_reorganize_norm`, wherever it
    computes the same.

    Args:
        block: the block to replace. Its submodules become this block's, under their names, so the keys of
            the state dict stay the same.
        keep_rate: share of the patch tokens to keep, in (0, 1].
        num_prefix_tokens: P, the tokens before the patches: class, distillation, registers.
        fuse_token: append the weighted sum of the patches that are not kept.

    Input [B, N, C]; output [B, N, C] where all patches are kept, else [B, P + K + 1, C] ([B, P + K, C]
    without `fuse_token`) with ``K = ceil(keep_rate * (N - P))``.
    """

    # nn.Module's __getattr__ types a submodule as "Tensor | Module".
    norm1: nn.Module
    attn: nn.Module
    norm2: nn.Module
    mlp: nn.Module
    ls1: nn.Module
    ls2: nn.Module
    drop_path1: nn.Module
    drop_path2: nn.Module

    def __init__(self, block: nn.Module, keep_rate: float, num_prefix_tokens: int, fuse_token: bool) -> None:
        super().__init__()
        for name, module in block.named_children():
            self.add_module(name, module)
        self.training = block.training
        # Hooks on the block go on running, and their handles remove them still: the dictionaries are shared.
        for hooks in _HOOKS:
            setattr(self, hooks, getattr(block, hooks))
        self.keep_rate = keep_rate
        self.num_prefix_tokens = num_prefix_tokens
        self.fuse_token = fuse_token
        #: The records that are being taken, each with the stage that this block is in it.
        self.recorders: tuple[tuple[TokenRecord, int], ...] = ()
        # In a tuple, so that it is not registered as a submodule and its parameters are not named twice.
        self._replaced = (block,)
        self._attend = SUPPORTED[type(block)][type(block.attn)]  # type: ignore[index]

    def original(self) -> nn.Module:
        """Return the replaced block with this block's submodules and mode."""
        (block,) = self._replaced
        for name, module in self.named_children():
            setattr(block, name, module)
        # Not train(): the submodules, which are shared, keep the modes they have.
        block.training = self.training
        return block

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        kept: list[Tensor] | None = None,
    ) -> Tensor:
        """Return the reorganised tokens.

        Args:
            x: tokens [B, N, C].
            attn_mask, is_causal: as of the replaced block; only where all patches are kept.
            kept: is given the kept patch tokens, int64 [B, K] as of :func:`evit_ext.ops.reorganize_tokens`,
                where not all are kept. A list, so that the output, which hooks see, is always the tokens.
        """
        num_patches = x.shape[1] - self.num_prefix_tokens
        num_keep = math.ceil(self.keep_rate * num_patches)
        masked = attn_mask is not None or is_causal
        normed: Tensor | None = None
        if masked and num_keep < num_patches:
            raise NotImplementedError(
                "a block that reorganises tokens takes no attn_mask and no is_causal: the mask of the tokens "
                "that are left is not known; set the keep rate to 1 or evit_ext.remove the reorganisation"
            )
        if num_keep == num_patches and (masked or not self.recorders):
            # timm's own attention, so that keep rate 1 is the unchanged model to the last bit.
            mask = {"attn_mask": attn_mask, "is_causal": is_causal} if masked else {}
            x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), **mask)))
        else:
            attended, scores = self._attend(self.attn, self.norm1(x))
            branch = self.drop_path1(self.ls1(attended))
            if num_keep < num_patches and _can_reorganize_and_norm_at_once(self.norm2, x, branch):
                norm: Any = self.norm2
                x, normed, index = ops.add_reorganize_norm(
                    x,
                    branch,
                    scores,
                    num_keep,
                    norm.weight,
                    norm.bias,
                    norm.eps,
                    self.num_prefix_tokens,
                    self.fuse_token,
                )
            else:
                x, index = ops.reorganize_tokens(
                    x + branch, scores, num_keep, self.num_prefix_tokens, self.fuse_token
                )
            if kept is not None and num_keep < num_patches:
                kept.append(index)
            for record, stage in self.recorders:
                fused = self.fuse_token and num_keep < num_patches
                record.add(stage, index, scores[:, self.num_prefix_tokens :], fused)
        if normed is None:
            normed = self.norm2(x)
        return x + self.drop_path2(self.ls2(self.mlp(normed)))

    def extra_repr(self) -> str:
        """Return the settings for ``print(model)``."""
        return (
            f"keep_rate={self.keep_rate}, num_prefix_tokens={self.num_prefix_tokens}, "
            f"fuse_token={self.fuse_token}"
        )

    def __getstate__(self) -> dict[str, Any]:
        # A copy or a saved model has no record being taken.
        return {**self.__dict__, "recorders": ()}


def reorganizing_blocks(vit: nn.Module) -> list[ReorganizingBlock]:
    """Return the reorganising blocks of `vit`, in order; empty where `apply` was not called."""
    blocks = getattr(vit, "blocks", None)
    if not isinstance(blocks, (nn.Sequential, nn.ModuleList)):
        return []
    return [block for block in blocks if isinstance(block, ReorganizingBlock)]
