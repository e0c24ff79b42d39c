"""This package's operators written as operators that every ONNX runtime has.

Each function computes what the function of its name in :mod:`evit_ext.ops.reference` does, for inference, of
PyTorch operators that become few and fast ONNX operators: sorts become TopK with a constant K, rows are
gathered by Gather from a flat list of rows, which copies each at once where GatherElements looks up every
element, and nothing is scattered: sums of rows are a product with zeros and ones. A program takes them by
``run_decompositions``; the blocks know nothing of it.

Notation: B batch, H heads, N tokens, P prefix tokens, K kept patches, C channels, D channels a head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def class_attention(q: Tensor, k: Tensor, scale: float, logsumexp: Tensor | None = None) -> Tensor:
    """Return the scores [B, N] of `q` [B, H, D] and `k` [B, H, N, D]; nobody gives a `logsumexp` here."""
    assert logsumexp is None
    # As a product with the transposed keys, which the attention itself has, too.
    logits = (q * scale).unsqueeze(2) @ k.transpose(2, 3)
    return logits.softmax(dim=-1).mean(dim=1).squeeze(1)


def mean_attention(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Return the scores [B, N] of `q` [B, H, M, D] and `k` [B, H, N, D]."""
    return ((q * scale) @ k.transpose(2, 3)).softmax(dim=-1).mean(dim=(1, 2))


def gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    """Return rows `index` [B, K] of `x` [B, N, C]: [B, K, C]."""
    first = torch.arange(x.shape[0], device=x.device).unsqueeze(1) * x.shape[1]
    rows = x.flatten(0, 1).index_select(0, (index + first).flatten())
    return rows.view(-1, index.shape[1], x.shape[2])


def scatter_tokens(x: Tensor, index: Tensor, num_tokens: int) -> Tensor:
    """Return the sums [B, num_tokens, C] of the rows of `x` [B, K, C] with the same `index` [B, K]."""
    places = torch.arange(num_tokens, device=x.device).view(1, -1, 1)
    return (index.unsqueeze(1) == places).to(x.dtype) @ x


def merge_tokens(
    x: Tensor, owner: Tensor, weights: Tensor, num_out: int, num_prefix_tokens: int
) -> tuple[Tensor, Tensor]:
    """Return the averages [B, P + M, C] and their total weights [B, M]."""
    places = torch.arange(num_out, device=x.device).view(1, -1, 1)
    owned = (owner.unsqueeze(1) == places).to(weights.dtype)
    counts, shares = owned.sum(dim=2, keepdim=True), owned * weights.unsqueeze(1)
    totals = shares.sum(dim=2, keepdim=True)
    patches = x[:, num_prefix_tokens:].to(weights.dtype)
    # One that is alone counts whole, whatever its weight; an owner of none has nothing to divide.
    merged = torch.where(counts > 1, shares / torch.where(counts > 1, totals, 1.0), owned) @ patches
    return torch.cat([x[:, :num_prefix_tokens], merged.to(x.dtype)], dim=1), totals.squeeze(2)


def bipartite_matching(keys: Tensor, num_out: int) -> tuple[Tensor, Tensor]:
    """Return kept [B, M] and owner [B, N]. NaN is ordered as the runtime likes."""
    num_tokens = keys.shape[2]
    metric = F.normalize(keys.mean(dim=1), dim=-1)
    similarity, partner = (metric[:, ::2] @ metric[:, 1::2].transpose(1, 2)).max(dim=-1)
    order = similarity.sort(dim=1, descending=True, stable=True).indices
    rank = order.sort(dim=1).indices  # of each of A: a permutation's inverse
    in_b = num_tokens // 2
    # Interleaved again: of B none goes.
    goes = _interleaved(rank < num_tokens - num_out, torch.zeros_like(rank[:, :in_b], dtype=torch.bool))
    places = (~goes).to(torch.int64).cumsum(dim=1) - 1
    of_partner = places.gather(1, 2 * partner + 1)
    owner = torch.where(goes, _interleaved(of_partner, of_partner[:, :in_b]), places)
    return goes.to(torch.int64).sort(dim=1, stable=True).indices[:, :num_out], owner


def _interleaved(a: Tensor, b: Tensor) -> Tensor:
    """Return the columns of `a` [B, K] and `b` [B, K or K − 1] in turn."""
    even = torch.stack([a[:, : b.shape[1]], b], dim=2).flatten(1)
    return torch.cat([even, a[:, b.shape[1] :]], dim=1)


def reorganize_tokens(
    x: Tensor, scores: Tensor, num_keep: int, num_prefix_tokens: int = 1, fuse: bool = True
) -> tuple[Tensor, Tensor]:
    """Return tokens [B, P + K (+ 1), C] and kept [B, K]. NaN is ordered as the runtime likes."""
    num_patches = x.shape[1] - num_prefix_tokens
    patch_scores = scores[:, scores.shape[1] - num_patches :]
    # Both sorts become TopK, which gives equal scores in the order of their indices, as the operator does.
    values, order = patch_scores.sort(dim=1, descending=True, stable=True)
    kept = order[:, :num_keep].sort(dim=1, stable=True).values
    if num_keep == num_patches:
        return x.clone(), kept
    parts = [x[:, :num_prefix_tokens], gather_tokens(x, kept + num_prefix_tokens)]
    if fuse:
        others = gather_tokens(x, order[:, num_keep:] + num_prefix_tokens)
        # The sum over the others alone: what all sum up to, less the kept ones, would lose digits.
        parts.append(values[:, num_keep:].unsqueeze(1).to(x.dtype) @ others)
    return torch.cat(parts, dim=1), kept


def add_reorganize_norm(
    x: Tensor,
    branch: Tensor,
    scores: Tensor,
    num_keep: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    num_prefix_tokens: int = 1,
    fuse: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the reorganised sum, its norm, and kept."""
    tokens, kept = reorganize_tokens(x + branch, scores, num_keep, num_prefix_tokens, fuse)
    return tokens, F.layer_norm(tokens, (tokens.shape[2],), weight, bias, eps), kept


def decompositions() -> dict[Any, Callable[..., Any]]:
    """Return the functions by the operators that they take the place of."""
    functions = (
        class_attention,
        mean_attention,
        gather_tokens,
        scatter_tokens,
        merge_tokens,
        bipartite_matching,
        reorganize_tokens,
        add_reorganize_norm,
    )
    return {getattr(torch.ops.evit, f.__name__).default: f for f in functions}
