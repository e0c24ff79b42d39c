"""ToMe as one would write it in PyTorch's operators on timm's modules, to compare with."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PlainToMe(nn.Module):
    """Bolya et al., "Token Merging" (ICLR 2023), written from the paper, for inference of timm's DeiT.

    Attention is scaled_dot_product_attention with the logarithms of the sizes as its mask. The tokens that
    stay are put together in the order in which they come about, so later blocks deal them otherwise than
    :class:`evit_ext.tokens.ToMe`, which leaves them in their places.

    Args:
        vit: timm's VisionTransformer with one class token; shared, not copied.
        r: how many patch tokens a block merges away.
        drop_loc: numbers of the blocks that merge; by default all.
    """

    def __init__(self, vit: nn.Module, r: int, drop_loc: Collection[int] | None = None) -> None:
        super().__init__()
        self.vit: Any = vit
        self.r = r
        self.drop_loc = range(len(self.vit.blocks)) if drop_loc is None else drop_loc

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits [B, classes] of images [B, 3, height, width]."""
        vit = self.vit
        x = vit.norm_pre(vit._pos_embed(vit.patch_embed(images)))
        size: Tensor | None = None  # [B, N, 1], of the tokens
        for number, block in enumerate(vit.blocks):
            out, keys = _attention(block.attn, block.norm1(x), size)
            x = x + out
            if number in self.drop_loc:
                x, size = _merge(x, size, keys, self.r)
            x = x + block.mlp(block.norm2(x))
        logits: Tensor = vit.forward_head(vit.norm(x))
        return logits


def _attention(attention: Any, x: Tensor, size: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the output [B, N, C] and the mean of the heads' keys [B, N, D]."""
    batch, tokens, channels = x.shape
    qkv = attention.qkv(x).view(batch, tokens, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.unbind(0)
    mask = None if size is None else size.log().transpose(1, 2).unsqueeze(1).to(x.dtype)
    out = F.scaled_dot_product_attention(q, k, v, mask)
    return attention.proj(out.transpose(1, 2).reshape(batch, tokens, channels)), k.mean(dim=1)


def _merge(x: Tensor, size: Tensor | None, keys: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Return the tokens that are left, and their sizes."""
    if size is None:
        size = torch.ones_like(x[..., :1])
    keys = keys / keys.norm(dim=-1, keepdim=True)
    first, second = slice(1, None, 2), slice(2, None, 2)  # of the patches, behind the class token
    similarity, partner = (keys[:, first] @ keys[:, second].transpose(1, 2)).max(dim=-1)
    order = similarity.argsort(dim=-1, descending=True)
    goes, stays = order[:, :r], order[:, r:].sort(dim=-1).values
    target = partner.gather(1, goes)

    def merged(values: Tensor) -> Tensor:
        a, b = values[:, first], values[:, second]
        width = values.shape[2]
        moved = a.gather(1, goes.unsqueeze(2).expand(-1, -1, width))
        b = b.scatter_add(1, target.unsqueeze(2).expand(-1, -1, width), moved)
        left = a.gather(1, stays.unsqueeze(2).expand(-1, -1, width))
        return torch.cat([values[:, :1], left, b], dim=1)

    sizes = merged(size)
    return merged(x * size) / sizes, sizes
