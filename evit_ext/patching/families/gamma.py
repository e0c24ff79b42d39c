"""Shared by the blocks of timm's Eva and Beit: branches scaled by parameters of the block."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class GammaBranches(nn.Module):
    """Attention and MLP branches, scaled by ``gamma_1`` and ``gamma_2`` where these are not None."""

    # Any, because the classes of timm that come after this one declare the same.
    norm1: Any
    attn: Any
    norm2: Any
    mlp: Any
    gamma_1: Any
    gamma_2: Any
    drop_path1: Any
    drop_path2: Any

    def scaled_attention(self, attended: Tensor) -> Tensor:
        """Return the attention branch: the attention's output, scaled, ready to add to the tokens."""
        out: Tensor = self.drop_path1(attended if self.gamma_1 is None else self.gamma_1 * attended)
        return out

    def mlp_norm(self) -> nn.Module | None:
        """See :meth:`ReorganizingBlock.mlp_norm`."""
        norm: nn.Module = self.norm2
        return norm

    def mlp_branch(self, x: Tensor, normed: Tensor | None) -> Tensor:
        """See :meth:`ReorganizingBlock.mlp_branch`."""
        out = self.mlp(self.norm2(x) if normed is None else normed)
        scaled: Tensor = self.drop_path2(out if self.gamma_2 is None else self.gamma_2 * out)
        return scaled
