"""timm's VisionTransformer: ViT, DeiT, AugReg, MAE, CLIP, DINO, DINOv2, SigLIP … and models built on it."""

from __future__ import annotations

import re
from typing import Any

import timm

# Attention is not imported from timm.layers: the oldest supported versions do not have it there.
from timm.layers import Mlp
from timm.models.vision_transformer import Attention, Block, ResPostBlock
from torch import Tensor, nn

from evit_ext.patching.attention import Attended, Wants, attend
from evit_ext.patching.block import AdoptedBlock, ReorganizingBlock
from evit_ext.patching.families.family import Family
from evit_ext.patching.families.timm_attention import TIMM_ATTENTION, attention_forward, mlp_forward
from evit_ext.patching.families.whole_block import attention_branch, block_forward, mlp_branch
from evit_ext.tokens.trail import TokenTrail

#: Older ones have no masks, or take those that are added for Boolean ones in some blocks.
_TAKES_BIAS = tuple(int(part) for part in re.findall(r"\d+", timm.__version__)[:3]) >= (1, 0, 20)


def mask_arguments(attn_mask: Tensor | None, is_causal: bool, bias: Tensor | None = None) -> dict[str, Any]:
    """Return the masks as arguments; empty without a mask, because older versions of timm do not take any.

    Args:
        attn_mask, is_causal: of timm's blocks.
        bias: takes the mask's place where tokens have sizes; a block that reduces them refuses other masks.
    """
    if bias is not None:
        if not _TAKES_BIAS:
            raise RuntimeError(
                f"attention that weighs merged tokens by their sizes needs timm 1.0.20 or newer, got "
                f"{timm.__version__}: install that, or use a rule with proportional=False"
            )
        return {"attn_mask": bias}
    masked = attn_mask is not None or is_causal
    return {"attn_mask": attn_mask, "is_causal": is_causal} if masked else {}


class _FollowingBlock(AdoptedBlock):
    """Shared by blocks that do not reduce tokens, but whose attention weighs them by their sizes."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Return the replaced block's result."""
        return self.as_before(x, **mask_arguments(attn_mask, is_causal, self.carried(x).bias))


class FollowingViTBlock(_FollowingBlock, Block):
    """A ``Block`` whose attention weighs tokens by their sizes."""

    REPLACES = Block


class FollowingResPostBlock(_FollowingBlock, ResPostBlock):
    """A ``ResPostBlock`` whose attention weighs tokens by their sizes."""

    REPLACES = ResPostBlock


class _ViTBlock(ReorganizingBlock):
    """Shared by the blocks of timm's VisionTransformer that reorganise tokens."""

    # nn.Module's __getattr__ types a submodule as "Tensor | Module", and the classes of timm as their own.
    norm1: Any
    attn: Any
    norm2: Any
    mlp: Any
    ls1: Any
    ls2: Any
    drop_path1: Any
    drop_path2: Any

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        trail: TokenTrail | None = None,
    ) -> Tensor:
        """Return the reorganised tokens of `x`; masks are allowed only if all patches are kept."""
        masks = mask_arguments(attn_mask, is_causal)
        return self.reorganize(
            x,
            lambda bias: self.as_before(x, **mask_arguments(attn_mask, is_causal, bias)),
            masked=bool(masks),
            trail=trail,
        )

    def mlp_norm(self) -> nn.Module | None:
        """See :meth:`ReorganizingBlock.mlp_norm`."""
        norm: nn.Module = self.norm2
        return norm


class ReorganizingViTBlock(_ViTBlock, Block):
    """timm's pre-norm ``Block`` with token reorganisation."""

    REPLACES = Block

    def attention_branch(
        self, x: Tensor, wants: Wants, positions: Any, bias: Tensor | None = None
    ) -> Attended:
        """See :meth:`ReorganizingBlock.attention_branch`."""
        branch = attention_branch(self, x) if bias is None and not wants.keys else None
        if branch is not None:
            out, scores = branch.attended(x, wants.scores and wants.mean)
            return Attended(branch.layers.out(out), scores if wants.scores else None, None)
        attended = attend(TIMM_ATTENTION, self.attn, self.norm1(x), wants, bias=bias)
        return attended._replace(out=self.drop_path1(self.ls1(attended.out)))

    def mlp_branch(self, x: Tensor, normed: Tensor | None) -> Tensor:
        """See :meth:`ReorganizingBlock.mlp_branch`."""
        branch = mlp_branch(self, x)
        if branch is not None:
            return branch.layers.out(branch.hidden(x, normed))
        normed = self.norm2(x) if normed is None else normed
        out: Tensor = self.drop_path2(self.ls2(self.mlp(normed)))
        return out


class ReorganizingResPostBlock(_ViTBlock, ResPostBlock):
    """timm's ``ResPostBlock``, whose norms come after attention and MLP, with token reorganisation."""

    REPLACES = ResPostBlock

    def attention_branch(
        self, x: Tensor, wants: Wants, positions: Any, bias: Tensor | None = None
    ) -> Attended:
        """See :meth:`ReorganizingBlock.attention_branch`."""
        attended = attend(TIMM_ATTENTION, self.attn, x, wants, bias=bias)
        return attended._replace(out=self.drop_path1(self.norm1(attended.out)))

    def mlp_norm(self) -> nn.Module | None:
        """See :meth:`ReorganizingBlock.mlp_norm`."""
        return None

    def mlp_branch(self, x: Tensor, normed: Tensor | None) -> Tensor:
        """See :meth:`ReorganizingBlock.mlp_branch`."""
        out: Tensor = self.drop_path2(self.norm2(self.mlp(x)))
        return out


FAMILY = Family(
    name="timm's VisionTransformer",
    model=None,  # other models with these blocks and a class token work too
    blocks={Block: ReorganizingViTBlock, ResPostBlock: ReorganizingResPostBlock},
    following={Block: FollowingViTBlock, ResPostBlock: FollowingResPostBlock},
    attentions=(Attention,),
    cpu_forwards={Block: block_forward, Attention: attention_forward, Mlp: mlp_forward},
)
