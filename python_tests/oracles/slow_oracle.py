"""An EViT that an oracle guides, written a second time, with sets of patches, to compare with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def attention_maps(vit: Any, images: Tensor) -> list[Tensor]:
    """Return the attention map [B, H, N, N] of every block of the plain timm model `vit`."""
    maps = []
    x = vit._pos_embed(vit.patch_embed(images))
    for block in vit.blocks:
        maps.append(_attention(block.attn, block.norm1(x))[1])
        x = block(x)
    return maps


def slow_guided(
    vit: Any, oracle: Any, images: Tensor, keep_rates: Sequence[float], drop_loc: Sequence[int], fuse: bool
) -> tuple[Tensor, list[list[list[int]]]]:
    """Run the plain timm model `vit` as an EViT whose patches the plain model `oracle` chooses.

    Returns the logits, and for each image and stage the patches it kept, ascending, fused tokens as -1 last.
    """
    with torch.no_grad():
        maps = attention_maps(oracle, images)
    prefix = vit.num_prefix_tokens
    rows, kept = [], []
    for b in range(len(images)):
        x = vit._pos_embed(vit.patch_embed(images[b : b + 1]))[0]
        tokens = [{patch} for patch in range(len(x) - prefix)]  # the patches that each token stands for
        fused_tokens: set[int] = set()
        stages = []
        for number, block in enumerate(vit.blocks):
            x = x + block.ls1(_attention(block.attn, block.norm1(x[None]))[0][0])
            if number in drop_loc:
                row = maps[number][b, :, 0, prefix:].mean(dim=0)
                scores = [sum(row[p] for p in patches) / len(patches) for patches in tokens]
                keep = math.ceil(keep_rates[list(drop_loc).index(number)] * len(tokens))
                order = sorted(range(len(tokens)), key=lambda j: (-float(scores[j]), j))
                chosen, others = sorted(order[:keep]), sorted(order[keep:])
                stages.append([-1 if j in fused_tokens else min(tokens[j]) for j in chosen])
                parts = [x[:prefix], x[[prefix + j for j in chosen]]]
                fused_tokens = {i for i, j in enumerate(chosen) if j in fused_tokens}
                new = [tokens[j] for j in chosen]
                if fuse and others:
                    parts.append(sum(scores[j] * x[prefix + j] for j in others)[None])
                    fused_tokens.add(len(new))
                    new.append(set().union(*(tokens[j] for j in others)))
                x, tokens = torch.cat(parts), new
            x = x + block.ls2(block.mlp(block.norm2(x)))
        rows.append(vit.forward_head(vit.norm(x[None]))[0])
        kept.append(stages)
    return torch.stack(rows), kept


def _attention(attention: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    batch, num_tokens, width = x.shape
    heads = attention.num_heads
    q, k, v = (
        part.reshape(batch, num_tokens, heads, -1).transpose(1, 2)
        for part in attention.qkv(x).chunk(3, dim=-1)
    )
    weights = (q @ k.transpose(2, 3) / math.sqrt(width // heads)).softmax(dim=-1)
    return attention.proj((weights @ v).transpose(1, 2).reshape(batch, num_tokens, width)), weights
