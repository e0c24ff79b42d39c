"""ToMe written a second time, slowly, from the paper: the oracle that merging models are compared with.

Each image by itself: a similarity matrix, an argmax, a sort, and lists of the patches a token is made of.
Shares no code with the package.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import slow_families as slow
import torch
from slow_families import _attention, _biases, _embed, _head, _projected, _scaled
from torch import Tensor

Groups = list[list[int]]


class SlowMerged(NamedTuple):
    """What a forward gives: logits [B, classes], and for each stage and image the patches of each token."""

    logits: Tensor
    groups: list[list[Groups]]


def merge(x: Tensor, keys: Tensor, groups: Groups, prefix: int, r: int) -> tuple[Tensor, Groups]:
    """Merge `r` of one image's tokens.

    Args:
        x: [N, C].
        keys: the heads' mean, [N, D].
        groups: the patches of each token after the prefix.
        prefix: P.
        r: how many are merged away.

    Returns:
        The tokens that are left, and their groups.
    """
    count = len(groups)
    of_a, of_b = list(range(0, count, 2)), list(range(1, count, 2))
    unit = (keys[prefix:] / keys[prefix:].norm(dim=1, keepdim=True)).detach()
    edges = []
    for i in of_a if r else []:
        similarities = [(unit[i] * unit[j]).sum().item() for j in of_b]
        best = max(similarities)
        edges.append((-best, i, of_b[similarities.index(best)]))
    into: dict[int, list[int]] = {j: [j] for j in range(count)}
    for _, i, j in sorted(edges)[:r]:
        into[j] = [*into[j], i]
        del into[i]
    rows, left = [x[p] for p in range(prefix)], []
    for j in sorted(into):
        weights = [len(groups[i]) for i in into[j]]
        rows.append(sum(w * x[prefix + i] for w, i in zip(weights, into[j], strict=True)) / sum(weights))
        left.append([patch for i in into[j] for patch in groups[i]])
    return torch.stack(rows), left


def log_sizes(groups: list[Groups], prefix: int, like: Tensor) -> Tensor:
    """Return the logarithms [B, 1, 1, N] of the numbers of patches, 0 for prefix tokens."""
    logs = [[0.0] * prefix + [math.log(len(group)) for group in image] for image in groups]
    return torch.tensor(logs, dtype=like.dtype)[:, None, None]


def slow_tome(
    vit: Any, images: Tensor, merged: Sequence[int], drop_loc: Sequence[int], proportional: bool = True
) -> SlowMerged:
    """Run the plain timm model `vit`, merging `merged` tokens at the blocks `drop_loc`."""
    x, prefix, places, grid = _embed(vit, images)
    rope = getattr(vit, "rope", None)
    rotations = None if rope is None else rope.get_embed(shape=list(grid))
    if vit.training:
        x, places = slow._drop_patches(vit, x, prefix, places)
    x = vit.norm_pre(x) if hasattr(vit, "norm_pre") else x
    groups: list[Groups] = [[[patch] for patch in range(places.shape[1])] for _ in images]
    stages = []
    for number, block in enumerate(vit.blocks):
        after = type(block).__name__ in ("ResPostBlock", "EvaBlockPostNorm")
        rotation = rotations[number] if rotations is not None and rotations.dim() == 4 else rotations
        bias = _biases(vit, block.attn, places, grid)
        if proportional:
            sizes = log_sizes(groups, prefix, x).expand(-1, block.attn.num_heads, -1, -1)
            bias = sizes if bias is None else bias + sizes
        normed = x if after else block.norm1(x)
        attended, _ = _attention(block.attn, normed, prefix, places, rotation, bias)
        x = x + (block.norm1(attended) if after else _scaled(block, 1, attended))
        if number in drop_loc:
            heads = _projected(block.attn, normed, prefix, places, rotation)
            keys = torch.stack([key for _, key, _ in heads]).mean(dim=0)
            r = merged[list(drop_loc).index(number)]
            rows, left, stays = [], [], []
            for b in range(len(x)):
                row, now = merge(x[b], keys[b], groups[b], prefix, r)
                # A token stays where the first of its patches is: the one that the others were merged into.
                first = {group[0]: i for i, group in enumerate(groups[b])}
                stays.append(places[b, [first[group[0]] for group in now]])
                rows.append(row)
                left.append(now)
            x, groups, places = torch.stack(rows), left, torch.stack(stays)
            stages.append(groups)
        x = x + (block.norm2(block.mlp(x)) if after else _scaled(block, 2, block.mlp(block.norm2(x))))
    return SlowMerged(_head(vit, vit.norm(x), prefix, places), stages)
