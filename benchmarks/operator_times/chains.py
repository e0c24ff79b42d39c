"""The work of the operators as the published method does it, in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from evit_ext import ops


def class_attention(q: Tensor, k: Tensor) -> Tensor:
    """The class token's row of the attention map, in PyTorch operators."""
    logits = (q.unsqueeze(2) @ k.transpose(-2, -1)).squeeze(2) * q.shape[2] ** -0.5
    return logits.softmax(-1).float().mean(1)


def attention_with_scores(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Not the published way, which keeps the map: PyTorch's attention, then our `class_attention`."""
    q, k, v = ops.reference.unpacked(qkv, heads)
    out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    return out, ops.class_attention(q[:, :, 0], k)


def reorganize_tokens(x: Tensor, scores: Tensor, num_keep: int) -> tuple[Tensor, Tensor]:
    """The published method's steps: topk, complement by sorting, two gathers, weighted sum, concatenation."""
    patches, patch_scores = x[:, 1:], scores[:, 1:]
    kept = patch_scores.topk(num_keep, dim=1).indices.sort(dim=1).values
    mask = torch.ones_like(patch_scores).scatter_(1, kept, 0)
    others = mask.sort(dim=1, descending=True, stable=True).indices[:, : patches.shape[1] - num_keep]
    rows = others.unsqueeze(-1).expand(-1, -1, x.shape[2])
    weights = patch_scores.gather(1, others).unsqueeze(-1).to(x.dtype)
    fused = (patches.gather(1, rows) * weights).sum(dim=1, keepdim=True)
    tokens = patches.gather(1, kept.unsqueeze(-1).expand(-1, -1, x.shape[2]))
    return torch.cat([x[:, :1], tokens, fused], dim=1), kept


def add_reorganize_norm(
    x: Tensor, branch: Tensor, scores: Tensor, num_keep: int, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Residual sum, the steps above, LayerNorm."""
    tokens, kept = reorganize_tokens(x + branch, scores, num_keep)
    return tokens, F.layer_norm(tokens, (x.shape[2],), weight, bias, 1e-6), kept


def gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[2]))


def scatter_tokens(x: Tensor, index: Tensor, num_tokens: int) -> Tensor:
    zeros = x.new_zeros(x.shape[0], num_tokens, x.shape[2])
    return zeros.scatter_add(1, index.unsqueeze(-1).expand(-1, -1, x.shape[2]), x)


def restore_tokens(x: Tensor, index: Tensor, num_patches: int, prefix: int, fill: Tensor) -> Tensor:
    return fill.scatter(1, index.unsqueeze(-1).expand(-1, -1, x.shape[2]), x)


def fuse_tokens(x: Tensor, weights: Tensor, index: Tensor) -> Tensor:
    rows = x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[2]))
    return (rows * weights.gather(1, index).unsqueeze(-1).to(x.dtype)).sum(dim=1)


def bipartite_matching(keys: Tensor, num_out: int) -> tuple[Tensor, Tensor]:
    """The map of cosines and sorts: no operator of PyTorch does with less."""
    return ops.reference.bipartite_matching(keys, num_out)


def merge_tokens(x: Tensor, owner: Tensor, num_out: int, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of what is weighted by sizes, divided by the sums of these."""
    totals = sizes.new_zeros(x.shape[0], num_out).scatter_add(1, owner, sizes)
    weighted = x[:, 1:] * sizes.unsqueeze(-1).to(x.dtype)
    sums = x.new_zeros(x.shape[0], num_out, x.shape[2])
    sums = sums.scatter_add(1, owner.unsqueeze(-1).expand_as(weighted), weighted)
    return torch.cat([x[:, :1], sums / totals.unsqueeze(-1).to(x.dtype)], dim=1), totals
