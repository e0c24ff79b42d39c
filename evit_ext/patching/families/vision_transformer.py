"""timm's VisionTransformer: ViT, DeiT, AugReg, MAE, CLIP, DINO, DINOv2, SigLIP … and models built on it."""

from __future__ import annotations

from typing import Any

# Attention is not imported from timm.layers: the oldest supported versions do not have it there.
from timm.layers import Mlp
from timm.models.vision_transformer import Attention, Block, ResPostBlock
from torch import Tensor, nn

from evit_ext.patching.attention import Score, attend
from evit_ext.patching.block import ReorganizingBlock
from evit_ext.patching.cpu_overrides import CpuAttention, CpuMlp
from evit_ext.patching.families.family import Family


def mask_arguments(attn_mask: Tensor | None, is_causal: bool) -> dict[str, Any]:
    """Return the masks as arguments; empty without a mask, because older versions of timm do not take any."""
    masked = attn_mask is not None or is_causal
    return {"attn_mask": attn_mask, "is_causal": is_causal} if masked else {}


class ReorganizingViTBlock(ReorganizingBlock):
    """timm's pre-norm ``Block`` with token reorganisation."""

    # nn.Module's __getattr__ types a submodule as "Tensor | Module".
    norm1: nn.Module
    attn: nn.Module
    norm2: nn.Module
    mlp: nn.Module
    ls1: nn.Module
    ls2: nn.Module
    drop_path1: nn.Module
    drop_path2: nn.Module

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        kept: list[Tensor] | None = None,
    ) -> Tensor:
        """Return the reorganised tokens of `x`; masks are allowed only if all patches are kept."""
        masks = mask_arguments(attn_mask, is_causal)
        return self.reorganize(x, lambda: self.as_before(x, **masks), masked=bool(masks), kept=kept)

    def attention_branch(self, x: Tensor, score: Score, positions: Any) -> tuple[Tensor, Tensor]:
        """See :meth:`ReorganizingBlock.attention_branch`."""
        attended, scores = attend(self.attn, self.norm1(x), score)
        return self.drop_path1(self.ls1(attended)), scores

    def mlp_norm(self) -> nn.Module | None:
        """See :meth:`ReorganizingBlock.mlp_norm`."""
        return self.norm2

    def mlp_branch(self, x: Tensor, normed: Tensor | None) -> Tensor:
        """See :meth:`ReorganizingBlock.mlp_branch`."""
        normed = self.norm2(x) if normed is None else normed
        return self.drop_path2(self.ls2(self.mlp(normed)))


class ReorganizingResPostBlock(ReorganizingViTBlock):
    """timm's ``ResPostBlock``, whose norms come after attention and MLP, with token reorganisation."""

    def attention_branch(self, x: Tensor, score: Score, positions: Any) -> tuple[Tensor, Tensor]:
        """See :meth:`ReorganizingBlock.attention_branch`."""
        attended, scores = attend(self.attn, x, score)
        return self.drop_path1(self.norm1(attended)), scores

    def mlp_norm(self) -> nn.Module | None:
        """See :meth:`ReorganizingBlock.mlp_norm`."""
        return None

    def mlp_branch(self, x: Tensor, normed: Tensor | None) -> Tensor:
        """See :meth:`ReorganizingBlock.mlp_branch`."""
        return self.drop_path2(self.norm2(self.mlp(x)))


FAMILY = Family(
    name="timm's VisionTransformer",
    model=None,  # other models with these blocks and a class token work too
    blocks={Block: ReorganizingViTBlock, ResPostBlock: ReorganizingResPostBlock},
    attentions=(Attention,),
    cpu_forwards={Attention: CpuAttention, Mlp: CpuMlp},
)
