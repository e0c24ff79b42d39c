"""EViT written a second time, slowly: the oracle that the models are compared with.

It shares no code with the package: it forms the attention map, selects with topk in the order of the scores,
as the published code does, and takes the model's parameters from its submodules one by one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def slow_evit(
    vit: Any, images: Tensor, keep_rates: Sequence[float], drop_loc: Sequence[int], fuse: bool = True
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Run the plain timm model `vit` as an EViT.

    Returns the logits, and for each stage the patches it kept [B, K] (in the order of their scores; -1 for an
    earlier fused token) and the scores [B, N - P] of the tokens that entered it.
    """
    x = vit.norm_pre(vit._pos_embed(vit.patch_embed(images)))
    prefix = vit.num_prefix_tokens
    ids = torch.arange(x.shape[1] - prefix, device=x.device).repeat(len(x), 1)
    all_kept, all_scores = [], []
    for number, block in enumerate(vit.blocks):
        attended, probabilities = _attention(block.attn, block.norm1(x))
        x = x + block.ls1(attended)
        if number in drop_loc:
            scores = probabilities[:, :, 0, prefix:].mean(dim=1)
            keep = math.ceil(keep_rates[list(drop_loc).index(number)] * scores.shape[1])
            best = scores.topk(keep, dim=1).indices
            rows = []
            for b in range(len(x)):
                chosen = set(best[b].tolist())
                others = [j for j in range(scores.shape[1]) if j not in chosen]
                row = [x[b, :prefix], x[b, [prefix + j for j in best[b].tolist()]]]
                if fuse and others:
                    row.append(sum(scores[b, j] * x[b, prefix + j] for j in others).unsqueeze(0))
                rows.append(torch.cat(row))
            fused = fuse and keep < scores.shape[1]
            x = torch.stack(rows)
            kept = ids.gather(1, best)
            all_kept.append(kept)
            # In the order of the patches, fused tokens last, which is the order of the package's tokens.
            order = ids.where(ids >= 0, ids.max() + 1).argsort(dim=1, stable=True)
            all_scores.append(scores.gather(1, order))
            ids = torch.cat([kept, kept.new_full((len(x), 1), -1)], dim=1) if fused else kept
        x = x + block.ls2(block.mlp(block.norm2(x)))
    return vit.forward_head(vit.norm(x)), all_kept, all_scores


def _attention(attention: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the attention's output and its map [B, H, N, N]."""
    batch, num_tokens, _ = x.shape
    heads, width = attention.num_heads, attention.head_dim
    packed = attention.qkv(x)
    q, k, v = (
        part.reshape(batch, num_tokens, heads, width).transpose(1, 2) for part in packed.chunk(3, dim=-1)
    )
    q, k = attention.q_norm(q), attention.k_norm(k)
    probabilities = (q @ k.transpose(2, 3) / math.sqrt(width)).softmax(dim=-1)
    out = (probabilities @ v).transpose(1, 2).reshape(batch, num_tokens, heads * width)
    if getattr(attention, "norm", None) is not None:
        out = attention.norm(out)
    if getattr(attention, "gate", None) is not None:
        out = out * attention.gate(x).sigmoid()
    return attention.proj(out), probabilities


def slow_bicubic(embedding: Tensor, height: int, width: int) -> Tensor:
    """Resize [h * w, C] patch embeddings of a square grid, by the definition of the cubic convolution."""
    side = math.isqrt(len(embedding))
    rows, columns = (_bicubic_matrix(side, new).to(embedding) for new in (height, width))
    grid = embedding.reshape(side, side, -1)
    return torch.einsum("yh,xw,hwc->yxc", rows, columns, grid).reshape(height * width, -1)


def _bicubic_matrix(old: int, new: int) -> Tensor:
    """Return the [new, old] weights of a cubic with a = -0.75, pixel centres at halves, edges repeated."""
    matrix = torch.zeros(new, old, dtype=torch.float64)
    for i in range(new):
        position = (i + 0.5) * old / new - 0.5
        for j in range(math.floor(position) - 1, math.floor(position) + 3):
            d = abs(position - j)
            if d <= 1:
                weight = 1.25 * d**3 - 2.25 * d**2 + 1
            else:
                weight = -0.75 * (d**3 - 5 * d**2 + 8 * d - 4)
            matrix[i, min(max(j, 0), old - 1)] += weight
    return matrix
