"""timm's Eva: EVA, EVA-02, DINOv3, Perception Encoder and other ViTs with rotary position embeddings.

The blocks of these models are told the rotary embeddings of all patches with every call. Once patches are
dropped, every block needs those of the tokens that are left; so the model is made to hand its blocks a
:class:`TokenTrail` instead, which the reorganising blocks add their stages to, and of which every block takes
what belongs to its tokens. The trail goes from block to block as an argument, hence also to a block that
gradient checkpointing computes again.

A fused token has no place on the grid. Like a class token, it is not rotated.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import Mlp
from timm.models.eva import Eva, EvaAttention, EvaBlock, EvaBlockPostNorm
from torch import Tensor, nn

from evit_ext.attention import Score, attend
from evit_ext.block import AdoptedBlock, ReorganizingBlock
from evit_ext.cpu_overrides import CpuAttention, CpuMlp
from evit_ext.families.family import Family
from evit_ext.families.gamma import GammaBranches
from evit_ext.families.vision_transformer import mask_arguments
from evit_ext.override import Override
from evit_ext.trail import TokenTrail

_ATTENTIONS: tuple[type[nn.Module], ...] = (EvaAttention,)
try:
    from timm.layers import AttentionRope
except ImportError:  # an older timm
    pass
else:
    _ATTENTIONS += (AttentionRope,)


class RotaryTrail(TokenTrail):
    """A trail that is handed to the blocks in the place of rotary embeddings.

    Args:
        positions: timm's rotary embeddings of all patches, [N - P, 2 D] with the sines in the first half, or
            with batch or heads or both in front; for models that have their own in each block, with the depth
            before all that, to be indexed by it.
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
        # A row for fused tokens, which -1 finds: the rotation by nothing.
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


class FollowingEvaBlock(AdoptedBlock):
    """An Eva block that is told the rotary embeddings of the tokens that are left where it stands."""

    def forward(
        self, x: Tensor, rope: Any = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Return what the replaced block computes."""
        masks = mask_arguments(attn_mask, is_causal)
        return self.as_before(x, rope=_rope(rope, self.stage), **masks)


class ReorganizingEvaBlock(GammaBranches, ReorganizingBlock):
    """timm's ``EvaBlock`` with token reorganisation."""

    def forward(
        self, x: Tensor, rope: Any = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Return the reorganised tokens of `x`; masks only where all patches are kept."""
        trail = rope if isinstance(rope, RotaryTrail) else None
        rope = _rope(rope, self.stage)
        masks = mask_arguments(attn_mask, is_causal)
        return self.reorganize(
            x, lambda: self.as_before(x, rope=rope, **masks), bool(masks), positions=rope, trail=trail
        )

    def attention_branch(self, x: Tensor, score: Score, positions: Any) -> tuple[Tensor, Tensor]:
        """See :meth:`ReorganizingBlock.attention_branch`."""
        attended, scores = attend(self.attn, self.norm1(x), score, rope=positions)
        return self.scaled_attention(attended), scores


class ReorganizingEvaBlockPostNorm(ReorganizingEvaBlock):
    """timm's ``EvaBlockPostNorm``, whose norms come after attention and MLP, with token reorganisation."""

    def attention_branch(self, x: Tensor, score: Score, positions: Any) -> tuple[Tensor, Tensor]:
        """See :meth:`ReorganizingBlock.attention_branch`."""
        attended, scores = attend(self.attn, x, score, rope=positions)
        return self.drop_path1(self.norm1(attended)), scores

    def mlp_norm(self) -> nn.Module | None:
        """See :meth:`ReorganizingBlock.mlp_norm`."""
        return None

    def mlp_branch(self, x: Tensor, normed: Tensor | None) -> Tensor:
        """See :meth:`ReorganizingBlock.mlp_branch`."""
        return self.drop_path2(self.norm2(self.mlp(x)))


class StartTrail(Override):
    """In the place of Eva's ``_pos_embed``: hands out a new trail with every forward."""

    def __call__(self, x: Tensor) -> tuple[Tensor, RotaryTrail | None]:
        """Return the tokens with their position embedding, and a trail of the rotary embeddings."""
        x, rope = self.original()(x)
        return x, None if rope is None else RotaryTrail(rope)


def _has_positions(vit: Any) -> bool:
    """Return whether the blocks of an Eva are told positions."""
    return vit.rope is not None


def _install(vit: Any) -> None:
    """Make an Eva hand trails to its blocks."""
    StartTrail(vit, "_pos_embed").install()


FAMILY = Family(
    name="timm's Eva",
    model=Eva,
    blocks={EvaBlock: ReorganizingEvaBlock, EvaBlockPostNorm: ReorganizingEvaBlockPostNorm},
    attentions=_ATTENTIONS,
    following=FollowingEvaBlock,
    has_positions=_has_positions,
    install=_install,
    cpu_forwards={**dict.fromkeys(_ATTENTIONS, CpuAttention), Mlp: CpuMlp},
)
