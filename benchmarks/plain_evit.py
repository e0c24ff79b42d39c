"""EViT as it is usually written: the comparison that this package's benchmarks are run against.

The published method (Liang et al., ICLR 2022) in plain PyTorch operators on timm's modules, the way such code
is found: the attention map is formed in all blocks, the scores are read from it, then topk, sort and gather.
It is nobody's code but ours, and not part of the package.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class PlainEViT(nn.Module):
    """A timm VisionTransformer with a class token, as an EViT in plain PyTorch.

    Args:
        vit: with learned q, k, v in one projection; it is copied.
        keep_rate: of every stage, in (0, 1].
        drop_loc: numbers of the blocks that drop patches.
    """

    def __init__(self, vit: nn.Module, keep_rate: float, drop_loc: Sequence[int] = (3, 6, 9)) -> None:
        super().__init__()
        self.vit: Any = copy.deepcopy(vit)
        self.keep_rate = keep_rate
        self.drop_loc = tuple(drop_loc)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [B, classes] of images [B, 3, height, width]."""
        vit = self.vit
        x = vit.norm_pre(vit._pos_embed(vit.patch_embed(images)))
        for number, block in enumerate(vit.blocks):
            attended, attention = _attention(block.attn, block.norm1(x))
            x = x + block.drop_path1(block.ls1(attended))
            if number in self.drop_loc:
                x = _keep_best(x, attention[:, :, 0, 1:].mean(dim=1), self.keep_rate)
            x = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
        return vit.forward_head(vit.norm(x))


def _attention(layer: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the attention's output [B, N, C] and its map [B, H, N, N]."""
    batch, tokens, channels = x.shape
    qkv = layer.qkv(x).reshape(batch, tokens, 3, layer.num_heads, channels // layer.num_heads)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    attention = ((q * layer.scale) @ k.transpose(-2, -1)).softmax(dim=-1)
    out = (layer.attn_drop(attention) @ v).transpose(1, 2).reshape(batch, tokens, channels)
    return layer.proj_drop(layer.proj(out)), attention


def _keep_best(x: Tensor, scores: Tensor, keep_rate: float) -> Tensor:
    """Return the class token, the best patches in the order of their scores, and the fused others."""
    patches = x[:, 1:]
    count, channels = patches.shape[1:]
    num_keep = math.ceil(keep_rate * count)
    if num_keep == count:
        return x
    best = scores.topk(num_keep, dim=1).indices
    others = torch.ones_like(scores, dtype=torch.bool).scatter(1, best, False)
    others = others.sort(dim=1, descending=True, stable=True).indices[:, : count - num_keep]
    kept = patches.gather(1, best[..., None].expand(-1, -1, channels))
    dropped = patches.gather(1, others[..., None].expand(-1, -1, channels))
    weights = scores.gather(1, others)
    fused = (dropped * weights[..., None]).sum(dim=1, keepdim=True)
    return torch.cat([x[:, :1], kept, fused.to(x.dtype)], dim=1)
