"""The transformer block that reorganises tokens between its attention and its MLP.

Notation: B batch, H heads, N tokens, P prefix tokens, K kept patches, C channels, D channels per head.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from timm.layers import LayerNorm
from torch import Tensor, nn

from evit_ext import ops
from evit_ext.ops import checks
from evit_ext.patching.attention import Score, class_token_score, mean_score
from evit_ext.tokens.trail import TokenTrail

if TYPE_CHECKING:
    from evit_ext.patching.oracle import Guidance
    from evit_ext.patching.recording import TokenRecord

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


#: Attributes that belong to one object and are not shared: an overridden forward, and a compiled call.
_BOUND = frozenset({"forward", "_compiled_call_impl"})

#: Norms that compute F.layer_norm with their weight, bias and eps. Compared exactly, because a subclass is
#: free to compute something else.
_LAYER_NORMS = (nn.LayerNorm, LayerNorm)


def _can_reorganize_and_norm_at_once(norm: nn.Module | None, x: Tensor, branch: Tensor) -> bool:
    """Return whether `ops.add_reorganize_norm` may replace sum, reorganisation and `norm`.

    It may if it computes the same and the norm has no hooks that would have to run.
    """
    # The operator is for inference. Only grad mode decides, not whether a tensor requires grad.
    if torch.is_grad_enabled() or type(norm) not in _LAYER_NORMS:
        return False
    assert norm is not None
    # Hooks, or an overridden forward as some libraries install.
    watched = any(getattr(norm, hooks) for hooks in _HOOKS) or torch.nn.modules.module._has_any_global_hook()
    if watched or "forward" in norm.__dict__:
        return False
    if checks.autocast_enabled(x.device.type):  # autocast runs LayerNorm in float32
        return False
    same_dtype = all(t is None or t.dtype == x.dtype for t in (branch, norm.weight, norm.bias))
    return same_dtype and norm.normalized_shape == (x.shape[2],)


class AdoptedBlock(nn.Module):
    """A block that replaces another and shares everything it has.

    Submodules, parameters, buffers, hooks and attributes are those of the replaced block, under the same
    names. State-dict keys therefore stay the same, hook handles still remove their hooks, and changes made
    here persist when the replaced block is restored. A block that was compiled (``block.compile()``) must be
    compiled again.

    Args:
        block: the block to replace.
        stage: number of the reorganising blocks before it.
    """

    #: Attributes that the replaced block must not receive.
    _OWN: frozenset[str] = frozenset({"_replaced", "stage"})

    def __init__(self, block: nn.Module, stage: int) -> None:
        nn.Module.__init__(self)
        # The dictionaries of parameters, submodules and hooks are shared, not copied.
        self.__dict__.update({name: value for name, value in block.__dict__.items() if name not in _BOUND})
        # In a tuple, so that it is not registered as a submodule and its parameters are not named twice.
        self._replaced = (block,)
        self.stage = stage

    def original(self) -> nn.Module:
        """Return the replaced block with this block's present state and mode."""
        (block,) = self._replaced
        shared = {k: v for k, v in self.__dict__.items() if k not in self._OWN and k not in _BOUND}
        for name in set(block.__dict__) - set(shared) - _BOUND:
            del block.__dict__[name]  # deleted from this block in the meantime
        block.__dict__.update(shared)
        return block

    def as_before(self, x: Tensor, *arguments: Any, **named: Any) -> Tensor:
        """Run the replaced block's forward without its hooks, which already run around this block."""
        return type(self._replaced[0]).forward(self, x, *arguments, **named)


class ReorganizingBlock(AdoptedBlock):
    """A transformer block that keeps the patches that receive the most attention.

    With the submodules of the block it replaces, it computes ``x + attention(x)``, then
    :func:`evit_ext.ops.reorganize_tokens`, then ``x + mlp(x)`` (Liang et al., ICLR 2022, section 3).
    If every patch is kept, the result is that of the replaced block. Without gradients, the sum, the
    reorganisation and the norm before the MLP run as one operator, :func:`evit_ext.ops.add_reorganize_norm`,
    wherever that computes the same.

    There is a subclass for each block class that can be replaced; see :mod:`evit_ext.patching.families`.

    Args:
        block: the block to replace.
        stage: number of the reorganising blocks before it.
        keep_rate: share of the patch tokens to keep, in (0, 1].
        num_prefix_tokens: P, the tokens before the patches: class, distillation, registers.
        fuse_token: append the weighted sum of the patches that are not kept.
        class_token: whether the first token is a class token, whose attention ranks the patches; if not, they
            are ranked by the mean attention of all tokens.

    Input [B, N, C]; output [B, N, C] if all patches are kept, else [B, P + K + 1, C] ([B, P + K, C]
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
        #: The active records, each with this block's stage number in that record.
        self.recorders: tuple[tuple[TokenRecord, int], ...] = ()
        #: Set while an oracle decides which patches to keep.
        self.guidance: Guidance | None = None

    def num_keep(self, num_patches: int) -> int:
        """Return K, how many of `num_patches` patch tokens the block keeps."""
        return math.ceil(self.keep_rate * num_patches)

    # The subclass for each block class defines the following methods.

    def attention_branch(self, x: Tensor, score: Score, positions: Any) -> tuple[Tensor, Tensor]:
        """Return the attention branch, to be added to `x` [B, N, C], and the scores [B, N] by `score`.

        `positions` is the position information that the model passes to its blocks, or None.
        """
        raise NotImplementedError

    def mlp_norm(self) -> nn.Module | None:
        """Return the norm that is applied first to the MLP's input, or None if no norm comes first."""
        raise NotImplementedError

    def mlp_branch(self, x: Tensor, normed: Tensor | None) -> Tensor:
        """Return the MLP branch, to be added to `x` [B, N, C]; `normed` is `mlp_norm` of x, if known."""
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
            masked: whether there is an attention mask; dropping tokens is then an error.
            positions: position information for :meth:`attention_branch`.
            trail: receives this stage.
            kept: receives the kept patch tokens, int64 [B, K] (see :func:`evit_ext.ops.reorganize_tokens`),
                unless all are kept. It is a list so that the block's output, which hooks see, is always the
                tokens alone.
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
            # The model's own code, so that keep rate 1 equals the unchanged model bit for bit.
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
        # A copy or a saved model takes no part in a recording or an oracle's guidance.
        # nn.Module's own method drops the compiled call, which is bound to this object.
        return {**super().__getstate__(), "recorders": (), "guidance": None}
