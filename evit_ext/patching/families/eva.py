"""timm's Eva: EVA, EVA-02, DINOv3, Perception Encoder and other ViTs with rotary position embeddings.

These models pass the rotary embeddings of all patches to every block. Once patches are dropped, each block
needs those of the remaining tokens. The model is therefore made to pass a :class:`TokenTrail` instead:
reorganising blocks add their stages to it, and every block reads the embeddings of its own tokens from it.
The trail travels as an argument, so it also reaches a block that gradient checkpointing computes again.

A fused token has no position on the grid. Like a class token, it is not rotated.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import Mlp
from timm.models.eva import Eva, EvaAttention, EvaBlock, EvaBlockPostNorm
from torch import Tensor, nn

from evit_ext._util.overriding import Override
from evit_ext.patching.attention import Attended, Wants, attend
from evit_ext.patching.block import AdoptedBlock, ReorganizingBlock
from evit_ext.patching.families.family import Family
from evit_ext.patching.families.gamma import GammaBranches
from evit_ext.patching.families.timm_attention import TIMM_ATTENTION, attention_forward, mlp_forward
from evit_ext.patching.families.vision_transformer import mask_arguments
from evit_ext.tokens.trail import TokenTrail

_ATTENTIONS: tuple[type[nn.Module], ...] = (EvaAttention,)
try:
    from timm.layers import AttentionRope
except ImportError:  # an older timm
    pass
else:
    _ATTENTIONS += (AttentionRope,)


class RotaryTrail(TokenTrail):
    """A trail that the blocks receive instead of rotary embeddings.

    Args:
        positions: timm's rotary embeddings of all patches, [N - P, 2 D] with the sines in the first half,
            optionally with batch or head dimensions or both in front. Models with separate embeddings for
            each block have the depth as the first dimension, and index it by block.
    """

    def __getitem__(self, block: int) -> RotaryTrail:
        """Return the trail with the rotary embeddings of one block."""
        return RotaryTrail(self.positions[block], same_way=self)

    def rope(self, stage: int) -> Tensor:
        """Return the rotary embeddings of the patch tokens that enter stage `stage`."""
        rope: Tensor = self.positions
        patches = self.patches(stage)
        if patches is None:
            return rope
        # [B or 1, H or 1, N - P, 2 D]
        rope = rope.reshape((1,) * (4 - rope.dim()) + tuple(rope.shape))
        sines, cosines = rope.chunk(2, dim=-1)
        # The last row, which index -1 selects, is for fused tokens: no rotation.
        rope = torch.cat(
            [
                rope,
                torch.cat([torch.zeros_like(sines[:, :, :1]), torch.ones_like(cosines[:, :, :1])], dim=-1),
            ],
            dim=2,
        )
        index = torch.where(patches < 0, rope.shape[2] - 1, patches)[:, None, :, None]
        rope = rope.expand(patches.shape[0], -1, -1, -1)
        return rope.gather(2, index.expand(-1, rope.shape[1], -1, rope.shape[3]))


def _rope(rope: Any, stage: int) -> Tensor | None:
    return rope.rope(stage) if isinstance(rope, RotaryTrail) else rope


class _FollowingBlock(AdoptedBlock):
    """Shared by Eva blocks that do not drop tokens but use rotary embeddings and sizes of those that come."""

    def forward(
        self, x: Tensor, rope: Any = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Return the replaced block's result."""
        masks = mask_arguments(attn_mask, is_causal, self.carried(x).bias)
        return self.as_before(x, rope=_rope(rope, self.stage), **masks)


class FollowingEvaBlock(_FollowingBlock, EvaBlock):
    """An ``EvaBlock`` with the rotary embeddings of the tokens that reach it."""

    REPLACES = EvaBlock


class FollowingEvaBlockPostNorm(_FollowingBlock, EvaBlockPostNorm):
    """An ``EvaBlockPostNorm`` with the rotary embeddings of the tokens that reach it."""

    REPLACES = EvaBlockPostNorm


class _EvaBlock(GammaBranches, ReorganizingBlock):
    """Shared by the blocks of timm's Eva that reorganise tokens."""

    def forward(
        self, x: Tensor, rope: Any = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Return the reorganised tokens of `x`; masks are allowed only if all patches are kept."""
        trail = rope if isinstance(rope, RotaryTrail) else None
        rope = _rope(rope, self.stage)
        masks = mask_arguments(attn_mask, is_causal)
        return self.reorganize(
            x,
            lambda bias: self.as_before(x, rope=rope, **mask_arguments(attn_mask, is_causal, bias)),
            bool(masks),
            positions=rope,
            trail=trail,
        )


class ReorganizingEvaBlock(_EvaBlock, EvaBlock):
    """timm's ``EvaBlock`` with token reorganisation."""

    REPLACES = EvaBlock

    def attention_branch(
        self, x: Tensor, wants: Wants, positions: Any, bias: Tensor | None = None
    ) -> Attended:
        """See :meth:`ReorganizingBlock.attention_branch`."""
        attended = attend(TIMM_ATTENTION, self.attn, self.norm1(x), wants, positions, bias)
        return attended._replace(out=self.scaled_attention(attended.out))


class ReorganizingEvaBlockPostNorm(_EvaBlock, EvaBlockPostNorm):
    """timm's ``EvaBlockPostNorm``, whose norms come after attention and MLP, with token reorganisation."""

    REPLACES = EvaBlockPostNorm

    def attention_branch(
        self, x: Tensor, wants: Wants, positions: Any, bias: Tensor | None = None
    ) -> Attended:
        """See :meth:`ReorganizingBlock.attention_branch`."""
        attended = attend(TIMM_ATTENTION, self.attn, x, wants, positions, bias)
        return attended._replace(out=self.drop_path1(self.norm1(attended.out)))

    def mlp_norm(self) -> nn.Module | None:
        """See :meth:`ReorganizingBlock.mlp_norm`."""
        return None

    def mlp_branch(self, x: Tensor, normed: Tensor | None) -> Tensor:
        """See :meth:`ReorganizingBlock.mlp_branch`."""
        return self.drop_path2(self.norm2(self.mlp(x)))


class StartTrail(Override):
    """Overrides Eva's ``_pos_embed`` to return a new trail in every forward."""

    def __call__(self, x: Tensor) -> tuple[Tensor, RotaryTrail | None]:
        """Return the tokens with their position embedding, and a trail of the rotary embeddings."""
        x, rope = self.original()(x)
        return x, None if rope is None else RotaryTrail(rope)


def _has_positions(vit: Any) -> bool:
    """Return whether an Eva passes positions to its blocks."""
    return vit.rope is not None


def _install(vit: Any) -> None:
    """Make an Eva pass trails to its blocks."""
    StartTrail(vit, "_pos_embed").install()


FAMILY = Family(
    name="timm's Eva",
    model=Eva,
    blocks={EvaBlock: ReorganizingEvaBlock, EvaBlockPostNorm: ReorganizingEvaBlockPostNorm},
    attentions=_ATTENTIONS,
    following={EvaBlock: FollowingEvaBlock, EvaBlockPostNorm: FollowingEvaBlockPostNorm},
    has_positions=_has_positions,
    install=_install,
    cpu_forwards={**dict.fromkeys(_ATTENTIONS, attention_forward), Mlp: mlp_forward},
)
