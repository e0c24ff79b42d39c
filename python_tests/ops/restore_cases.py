"""Inputs of restore_tokens, and what it computes, a row at a time."""

from __future__ import annotations

import torch
from torch import Tensor


def make(
    batch: int, num_kept: int, channels: int, num_patches: int, others: int = 2, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Tokens [B, `others` + K, C], as many as there are prefix and fused tokens, and kept [B, K]."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(batch, num_kept + others, channels, dtype=torch.float64, generator=generator)
    ranks = torch.rand(batch, num_patches, generator=generator).argsort(dim=1)
    return tokens, ranks[:, :num_kept].sort(dim=1).values


def make_fill(batch: int, num_tokens: int, channels: int) -> Tensor:
    generator = torch.Generator().manual_seed(99)
    return torch.randn(batch, num_tokens, channels, dtype=torch.float64, generator=generator)


def plain_loops(
    tokens: Tensor, kept: Tensor, num_patches: int, num_prefix_tokens: int, fill: str | Tensor
) -> Tensor:
    """The definition, a row at a time."""
    out = torch.zeros(tokens.shape[0], num_prefix_tokens + num_patches, tokens.shape[2], dtype=tokens.dtype)
    for b in range(tokens.shape[0]):
        out[b, :num_prefix_tokens] = tokens[b, :num_prefix_tokens]
        for patch in range(num_patches):
            places = kept[b].tolist()
            row = num_prefix_tokens + patch
            if patch in places:
                out[b, row] = tokens[b, num_prefix_tokens + places.index(patch)]
            elif isinstance(fill, Tensor):
                out[b, row] = fill[b, row]
            elif fill == "fused":
                out[b, row] = tokens[b, -1]
    return out
