"""Shared by the blocks of timm's Eva and Beit: branches scaled by parameters of the block."""

from __future__ import annotations

from torch import Tensor, nn


class GammaBranches(nn.Module):
    """Attention and MLP branches, scaled by ``gamma_1`` and ``gamma_2`` where these are not None."""

    norm1: nn.Module
    attn: nn.Module
    norm2: nn.Module
    mlp: nn.Module
    gamma_1: Tensor | None
    gamma_2: Tensor | None
    drop_path1: nn.Module
    drop_path2: nn.Module

    def scaled_attention(self, attended: Tensor) -> Tensor:
        """Return the attention branch: the attention's output, scaled, ready to add to the tokens."""
        return self.drop_path1(attended if self.gamma_1 is None else self.gamma_1 * attended)

    def mlp_norm(self) -> nn.Module | None:
        """See :meth:`ReorganizingBlock.mlp_norm`."""
        return self.norm2

    def mlp_branch(self, x: Tensor, normed: Tensor | None) -> Tensor:
        """See :meth:`ReorganizingBlock.mlp_branch`."""
        out = self.mlp(self.norm2(x) if normed is None else normed)
        return self.drop_path2(out if self.gamma_2 is None else self.gamma_2 * out)
