"""The transformer block that reduces tokens between its attention and its MLP.

Notation: B batch, H heads, N tokens, P prefix tokens, K kept patches, C channels, D channels per head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.fx
from torch import Tensor, nn

from evit_ext.cpu.forward import LAYER_NORMS, has_written_forward, is_watched, is_written
from evit_ext.cpu.known import KNOWN
from evit_ext.ops import checks
from evit_ext.patching.attention import Attended, Wants
from evit_ext.patching.token_sizes import Carried, TokenSizes
from evit_ext.tokens.plan import Plan
from evit_ext.tokens.rule import Rule, Seen
from evit_ext.tokens.stage import Stage
from evit_ext.tokens.trail import TokenTrail

#: Attributes that belong to one object and are not shared: an overridden forward, a compiled call and what
#: is known of the block.
_BOUND = frozenset({"forward", "_compiled_call_impl", KNOWN})


def _norms_as_written(norm: nn.Module | None, x: Tensor, branch: Tensor) -> bool:
    """Return whether one operator may compute the sum, the reduction and `norm` of x + branch.

    It may if it computes the same and the norm has no hooks that would have to run.
    """
    # The operator is for inference. Only grad mode decides, not whether a tensor requires grad.
    if torch.is_grad_enabled() or type(norm) not in LAYER_NORMS:
        return False
    assert norm is not None
    # Hooks, or an overridden forward as some libraries install.
    if is_watched(norm) or "forward" in norm.__dict__ or not has_written_forward(norm):
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
        token_sizes: carries the sizes of tokens from block to block, if a rule of the model wants them.
        last: no block comes after it.
    """

    #: The class of the blocks that it replaces.
    REPLACES: ClassVar[type[nn.Module]]

    #: Attributes that the replaced block must not receive.
    _OWN: frozenset[str] = frozenset({"_replaced", "stage", "token_sizes", "last"})

    def __init__(
        self, block: nn.Module, stage: int, token_sizes: TokenSizes | None = None, last: bool = False
    ) -> None:
        nn.Module.__init__(self)
        # The dictionaries of parameters, submodules and hooks are shared, not copied.
        self.__dict__.update({name: value for name, value in block.__dict__.items() if name not in _BOUND})
        # In a tuple, so that it is not registered as a submodule and its parameters are not named twice.
        self._replaced = (block,)
        self.stage = stage
        self.token_sizes = token_sizes
        self.last = last

    def carried(self, x: Tensor) -> Carried:
        """Return the sizes of the tokens `x` [B, N, C] that enter; see :meth:`TokenSizes.enter`."""
        if self.token_sizes is None:  # and the number of the stage, which each would compile for, is not read
            return Carried()
        return self.token_sizes.enter(x, isinstance(self, Stage) and self.stage == 0, self.last)

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
        out: Tensor = self.REPLACES.forward(self, x, *arguments, **named)
        return out


class ReorganizingBlock(Stage, AdoptedBlock):
    """A transformer block that reduces its tokens by a rule, EViT's or another.

    With the submodules of the block it replaces, it computes ``x + attention(x)``, then what the rule plans,
    then ``x + mlp(x)`` (Liang et al., ICLR 2022, section 3). If every patch is kept, the result is that of
    the replaced block. Without gradients, the sum, the reduction and the norm before the MLP run as one
    operator wherever that computes the same and the rule has one.

    There is a subclass for each block class that can be replaced; see :mod:`evit_ext.patching.families`. It
    is a subclass of that class too, so that policies which go by a block's class find it.

    Args:
        block: the block to replace.
        stage: number of the stages before it.
        rule: how it reduces its tokens.
        num_prefix_tokens: P, the tokens before the patches: class, distillation, registers.
        class_token: whether the first token is a class token, whose attention ranks the patches; if not, they
            are ranked by the mean attention of all tokens.
        token_sizes, last: see :class:`AdoptedBlock`.
        after_mlp: the tokens are reduced when the block has computed all of them, after its MLP, by the
            attention of this block: for readers of its features, as :mod:`evit_ext.towers` has them.

    Input [B, N, C]; output [B, P + M, C] with M = ``rule.num_out``.
    """

    _OWN = AdoptedBlock._OWN | {
        "rule",
        "num_prefix_tokens",
        "class_token",
        "after_mlp",
        "recorders",
        "guidance",
    }

    def __init__(
        self,
        block: nn.Module,
        stage: int,
        rule: Rule,
        num_prefix_tokens: int,
        class_token: bool = True,
        token_sizes: TokenSizes | None = None,
        last: bool = False,
        after_mlp: bool = False,
    ) -> None:
        AdoptedBlock.__init__(self, block, stage, token_sizes, last)
        self.rule = rule
        self.num_prefix_tokens = num_prefix_tokens
        self.class_token = class_token
        self.after_mlp = after_mlp
        self.recorders = ()
        self.guidance = None

    # The subclass for each block class defines the following methods.

    def attention_branch(
        self, x: Tensor, wants: Wants, positions: Any, bias: Tensor | None = None
    ) -> Attended:
        """Return the attention branch, to be added to `x` [B, N, C], and what the rule wants of it.

        `positions` is the position information that the model passes to its blocks, or None; `bias`
        [B, 1, 1, N] is added to the logits for each key.
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
        unchanged: Callable[[Tensor | None], Tensor],
        masked: bool = False,
        positions: Any = None,
        trail: TokenTrail | None = None,
    ) -> Tensor:
        """Return the tokens that leave the block.

        Args:
            x: tokens [B, N, C].
            unchanged: runs the replaced block on `x`, given what :meth:`attention_branch` is given as bias;
                called if all patches are kept.
            masked: whether there is an attention mask; dropping tokens is then an error.
            positions: position information for :meth:`attention_branch`.
            trail: receives this stage.
        """
        prefix = self.num_prefix_tokens
        rule = self.rule  # once: another thread may set it
        num_patches = _size(x) - prefix
        # Without a trail nobody hands it on, and by its own number each block would be a graph of its own.
        num_image_patches = None if trail is None else trail.num_image_patches(num_patches)
        keeps_all = rule.num_kept(num_patches, num_image_patches) == num_patches
        carried = self.carried(x)
        if masked and not (keeps_all and carried.bias is None):
            raise NotImplementedError(
                "a block that reorganises tokens takes no attention mask (attn_mask, is_causal): the mask of "
                "the tokens that are left is not known; set the keep rate to 1 or evit_ext.remove the "
                "reorganisation"
            )
        if keeps_all and (masked or not self.recorders):
            # The model's own code, so that keep rate 1 equals the unchanged model bit for bit.
            return unchanged(carried.bias)
        self._check_block()
        wanted = frozenset(rule.wants())
        if "sizes" in wanted and self.token_sizes is None:
            raise RuntimeError(
                f"the rule {rule.name} was set after evit_ext.apply, and the blocks hand on no sizes of "
                "tokens: call evit_ext.remove, then evit_ext.apply with the rule"
            )
        guided = self.guidance is not None and not keeps_all
        wants = Wants(
            scores="scores" in wanted and not guided, keys="keys" in wanted, mean=not self.class_token
        )
        branch: Tensor | None
        branch, scores, keys = self.attention_branch(x, wants, positions, carried.bias)
        if self.guidance is not None and guided:
            scores = self.guidance.scores(self.stage, x, num_patches)
        if self.after_mlp:
            x, branch = x + branch, None
            x = x + self.mlp_branch(x, None)
        seen = Seen(x, branch, prefix, num_patches, num_image_patches, scores, keys, carried.sizes)
        plan = rule.plan(seen)
        self._check_plan(rule, plan, num_patches, num_image_patches)
        norm: Any = self.mlp_norm()
        both = None
        if branch is not None and not self.wants_tokens() and _norms_as_written(norm, x, branch):
            both = plan.add_apply_norm(x, branch, prefix, norm)
        if both is None:
            out, normed = plan.apply(seen.tokens, prefix), None
        else:
            out, normed = both
        if self.token_sizes is not None and not self.last:
            self.token_sizes.leave(x, rule, plan, carried, prefix)
        if trail is not None or self.recorders or guided:
            self.report(plan, trail, seen.tokens if self.wants_tokens() else None)
        return out if self.after_mlp else out + self.mlp_branch(out, normed)

    @staticmethod
    def _check_plan(rule: Rule, plan: Plan, num_patches: int, num_image_patches: int | None) -> None:
        """Raise ValueError where the rule plans something else than it says from sizes alone."""
        planned = (plan.num_kept, plan.num_kept + plan.num_made)
        said = (
            rule.num_kept(num_patches, num_image_patches),
            rule.num_out(num_patches, num_image_patches),
        )
        if planned != said:
            raise ValueError(
                f"the rule {rule.name} says that of {num_patches} patch tokens {said[0]} are kept and "
                f"{said[1]} leave, and plans {planned[0]} and {planned[1]}: see its num_kept and num_out"
            )

    def _check_block(self) -> None:
        """Raise where the block's class computes something else than when evit_ext was imported."""
        if not is_written(self.REPLACES):
            raise RuntimeError(
                f"{self.REPLACES.__name__}.forward was replaced by other code, which a block that "
                "reorganises tokens cannot run in part: undo that, or call evit_ext.remove"
            )

    def extra_repr(self) -> str:
        """Return the settings for ``print(model)``."""
        place = ", after_mlp=True" if self.after_mlp else ""
        return f"rule={self.rule}, num_prefix_tokens={self.num_prefix_tokens}{place}"


def _size(x: Tensor) -> int:
    """Return N of `x` [B, N, C]; TypeError or RuntimeError for tracers that cannot follow a reduction."""
    if isinstance(x, torch.fx.Proxy):
        raise TypeError(
            "torch.fx cannot trace a block that reorganises tokens, whose sizes it must know: use "
            "torch.export, or forward_intermediates for features, or evit_ext.remove"
        )
    if torch.jit.is_tracing():
        if torch.onnx.is_in_onnx_export():
            raise RuntimeError(
                "torch.onnx.export cannot write a block that reorganises tokens: use "
                "evit_ext.export.export_model or evit export --format onnx"
            )
        # A traced size is a float32 tensor in arithmetic, and would round K differently.
        return int(x.shape[1])
    return x.shape[1]
