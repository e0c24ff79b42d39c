"""The transformer block that reorganises tokens between its attention and its MLP.

Notation: B batch, H heads, N tokens, P prefix tokens, K kept patches, C channels, D channels a head.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from timm.layers import LayerNorm
from torch import Tensor, nn

from evit_ext import ops
from evit_ext.attention import Score, class_token_score, mean_score
from evit_ext.ops import checks
from evit_ext.trail import TokenTrail

if TYPE_CHECKING:
    from evit_ext.oracle import Guidance
    from evit_ext.record import TokenRecord

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


#: What belongs to one object and is not shared: a forward put in place of the class's, and a compiled call.
_BOUND = frozenset({"forward", "_compiled_call_impl"})

#: Norms that compute F.layer_norm of their weight, bias and eps. Compared exactly, because a subclass is free
#: to compute something else.
_LAYER_NORMS = (nn.LayerNorm, LayerNorm)


def _can_reorganize_and_norm_at_once(norm: nn.Module | None, x: Tensor, branch: Tensor) -> bool:
    """Return whether `ops.add_reorganize_norm` may take the place of sum, reorganisation and `norm`.

    That is, whether it computes the same, and nobody wants to see the norm being called.
    """
    # An operator for inference. Grad mode alone decides, not whether a tensor requires grad.
    if torch.is_grad_enabled() or type(norm) not in _LAYER_NORMS:
        return False
    assert norm is not None
    # Somebody's hooks, or a forward put in place of the class's, as some libraries do.
    watched = any(getattr(norm, hooks) for hooks in _HOOKS) or torch.nn.modules.module._has_any_global_hook()
    if watched or "forward" in norm.__dict__:
        return False
    if checks.autocast_enabled(x.device.type):  # under which LayerNorm runs in float32
        return False
    same_dtype = all(t is None or t.dtype == x.dtype for t in (branch, norm.weight, norm.bias))
    return same_dtype and norm.normalized_shape == (x.shape[2],)


class AdoptedBlock(nn.Module):
    """A block that replaces another and shares everything it has.

    Submodules, parameters, buffers, hooks and attributes are those of the replaced block, under the same
    names. So state-dict keys stay the same, hook handles still remove their hooks, and changes made here are
    still there when the replaced block comes back. A block that was compiled (``block.compile()``) must be
    compiled again.

    Args:
        block: the block to replace.
        stage: number of the reorganising blocks before it.
    """

    #: This block's own attributes, which the replaced block must not get.
    _OWN: frozenset[str] = frozenset({"_replaced", "stage"})

    def __init__(self, block: nn.Module, stage: int) -> None:
        nn.Module.__init__(self)
        # The dictionaries of parameters, submodules and hooks are shared, not copied.
        self.__dict__.update({name: value for name, value in block.__dict__.items() if name not in _BOUND})
        # In a tuple, so that it is not registered as a submodule and its parameters are not named twice.
        self._replaced = (block,)
        self.stage = stage

    def original(self) -> nn.Module:
        """Return the replaced block, with everything this one has now, and in the same mode."""
        (block,) = self._replaced
        shared = {k: v for k, v in self.__dict__.items() if k not in self._OWN and k not in _BOUND}
        for name in set(block.__dict__) - set(shared) - _BOUND:
            del block.__dict__[name]  # was deleted from this block since
        block.__dict__.update(shared)
        return block

    def as_before(self, x: Tensor, *arguments: Any, **named: Any) -> Tensor:
        """Return what the replaced block computes, without its hooks, which run around this one."""
        return type(self._replaced[0]).forward(self, x, *arguments, **named)


class ReorganizingBlock(AdoptedBlock):
    """A transformer block that keeps the patches that receive the most attention.

    Computes, with the submodules of the block it replaces, ``x + attention(x)``, then
    :func:`evit_ext.ops.reorganize_tokens`, then ``x + mlp(x)`` (Liang et al., ICLR 2022, section 3).
    If every patch is kept, it computes what the replaced block computes. Without gradients, the sum, the
    reorganisation and the norm before the MLP run as one operator, :func:`evit_ext.ops.add_reorganize_norm`,
    wherever that computes the same.

    There is a subclass for each block class that can be replaced; see :mod:`evit_ext.families`.

    Args:
        block: the block to replace.
        stage: number of the reorganising blocks before it.
        keep_rate: share of the patch tokens to keep, in (0, 1].
        num_prefix_tokens: P, the tokens before the patches: class, distillation, registers.
        fuse_token: append the weighted sum of the patches that are not kept.
        class_token: whether the first token is a class token, whose attention ranks the patches; if not, the
            mean of all tokens' attention does.

    Input [B, N, C]; output [B, N, C] where all patches are kept, else [B, P + K + 1, C] ([B, P + K, C]
    without `fuse_token`) with ``K = ceil(keep_rate * (N - P))``.
    """

    _OWN = AdoptedBlock._OWN | {
        "keep_rate",
        "num_prefix_tokens",
        "fuse_token",
        "class_token",
        "recorders",
        "guidance",
    }

    def __init__(
        self,
        block: nn.Module,
        stage: int,
        keep_rate: float,
        num_prefix_tokens: int,
        fuse_token: bool,
        class_token: bool = True,
    ) -> None:
        super().__init__(block, stage)
        self.keep_rate = keep_rate
        self.num_prefix_tokens = num_prefix_tokens
        self.fuse_token = fuse_token
        self.class_token = class_token
        #: The active records, each with the number that this block has among their stages.
        self.recorders: tuple[tuple[TokenRecord, int], ...] = ()
        #: Set while an oracle decides which patches to keep.
        self.guidance: Guidance | None = None

    def num_keep(self, num_patches: int) -> int:
        """Return K, how many of the patch tokens that enter the block it keeps."""
        return math.ceil(self.keep_rate * num_patches)

    # To be defined by the subclass for a block class.

    def attention_branch(self, x: Tensor, score: Score, positions: Any) -> tuple[Tensor, Tensor]:
        """Return what the attention adds to `x` [B, N, C], and the scores [B, N] of `score`.

        `positions` is what the model tells its blocks about the positions of the tokens, or None.
        """
        raise NotImplementedError

    def mlp_norm(self) -> nn.Module | None:
        """Return the norm that the MLP's input goes through first; None where it is not the first."""
        raise NotImplementedError

    def mlp_branch(self, x: Tensor, normed: Tensor | None) -> Tensor:
        """Return what the MLP adds to `x` [B, N, C]; `normed` is x after :meth:`mlp_norm` if it is known."""
        raise NotImplementedError

    def reorganize(
        self,
        x: Tensor,
        unchanged: Callable[[], Tensor],
        masked: bool = False,
        positions: Any = None,
        trail: TokenTrail | None = None,
        kept: list[Tensor] | None = None,
    ) -> Tensor:
        """Return the reorganised tokens.

        Args:
            x: tokens [B, N, C].
            unchanged: runs the replaced block on `x`; called if all patches are kept.
            masked: whether there is an attention mask, with which no token can be dropped.
            positions: of the tokens, for :meth:`attention_branch`.
            trail: the stage is added to it.
            kept: the kept patch tokens, int64 [B, K] (see :func:`evit_ext.ops.reorganize_tokens`), are
                appended to it unless all are kept. A list, so that the output that hooks see is always the
                tokens.
        """
        prefix = self.num_prefix_tokens
        num_patches = x.shape[1] - prefix
        num_keep = self.num_keep(num_patches)
        reorganizes = num_keep < num_patches
        if masked and reorganizes:
            raise NotImplementedError(
                "a block that reorganises tokens takes no attention mask (attn_mask, is_causal): the mask of "
                "the tokens that are left is not known; set the keep rate to 1 or evit_ext.remove the "
                "reorganisation"
            )
        if not reorganizes and (masked or not self.recorders):
            # The model's own code, so that keep rate 1 is the unchanged model to the last bit.
            return unchanged()
        score = class_token_score if self.class_token else mean_score
        branch, scores = self.attention_branch(x, score, positions)
        if self.guidance is not None and reorganizes:
            scores = self.guidance.scores(self.stage, x, num_patches)
        norm: Any = self.mlp_norm()
        normed: Tensor | None = None
        wants_tokens = any(record.keep_tokens for record, _ in self.recorders)
        before = x + branch if wants_tokens else None
        if before is None and reorganizes and _can_reorganize_and_norm_at_once(norm, x, branch):
            x, normed, index = ops.add_reorganize_norm(
                x,
                branch,
                scores,
                num_keep,
                norm.weight,
                norm.bias,
                norm.eps,
                prefix,
                self.fuse_token,
            )
        else:
            x = x + branch if before is None else before
            x, index = ops.reorganize_tokens(x, scores, num_keep, prefix, self.fuse_token)
        fused = self.fuse_token and reorganizes
        if reorganizes:
            if kept is not None:
                kept.append(index)
            if trail is not None:
                trail.add(self.stage, index, num_patches, fused)
            if self.guidance is not None:
                self.guidance.add(self.stage, index, num_patches, fused)
        for record, stage in self.recorders:
            record.add(stage, index, scores[:, scores.shape[1] - num_patches :], fused, before)
        return x + self.mlp_branch(x, normed)

    def extra_repr(self) -> str:
        """Return the settings for ``print(model)``."""
        return (
            f"keep_rate={self.keep_rate}, num_prefix_tokens={self.num_prefix_tokens}, "
            f"fuse_token={self.fuse_token}"
        )

    def __getstate__(self) -> dict[str, Any]:
        # A copy or a saved model has no record being taken, and no oracle.
        # nn.Module's takes away what was compiled, which is bound to this object.
        return {**super().__getstate__(), "recorders": (), "guidance": None}
