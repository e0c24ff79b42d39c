"""What the blocks of timm's Eva and Beit have in common: branches scaled by the block's own parameters."""

from __future__ import annotations

from torch import Tensor, nn


class GammaBranches(nn.Module):
    """Branches of attention and MLP, scaled by ``gamma_1`` and ``gamma_2`` where these are not None."""

    norm1: nn.Module
    attn: nn.Module
    norm2: nn.Module
    mlp: nn.Module
    gamma_1: Tensor | None
    gamma_2: Tensor | None
    drop_path1: nn.Module
    drop_path2: nn.Module

    def scaled_attention(self, attended: Tensor) -> Tensor:
        """Return what is added to the tokens, of what the attention returned."""
        return self.drop_path1(attended if self.gamma_1 is None else self.gamma_1 * attended)

    def mlp_norm(self) -> nn.Module | None:
        """See :meth:`ReorganizingBlock.mlp_norm`."""
        return self.norm2

    def mlp_branch(self, x: Tensor, normed: Tensor | None) -> Tensor:
        """See :meth:`ReorganizingBlock.mlp_branch`."""
        out = self.mlp(self.norm2(x) if normed is None else normed)
        return self.drop_path2(out if self.gamma_2 is None else self.gamma_2 * out)
