"""DynamicViT written a second time, slowly: the oracle that the model is compared with.

It shares no code with the package: it forms every attention map, selects with argsort in the order of the
scores, as the published code does, and takes the model's parameters from its submodules one by one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def slow_dynamicvit(
    vit: Any, images: Tensor, keep_ratios: Sequence[float], drop_loc: Sequence[int]
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Run `vit` as in inference.

    Returns the logits, and for each stage the patches it kept [B, K], ordered by their scores, and the scores
    of the patches that entered it, in the order of the patches.
    """
    x = vit._pos_embed(vit.patch_embed(images))
    prefix = vit.num_prefix_tokens
    total = x.shape[1] - prefix
    ids = torch.arange(total, device=x.device).repeat(len(x), 1)
    all_kept, all_scores = [], []
    for number, block in enumerate(vit.blocks):
        if number in drop_loc:
            stage = list(drop_loc).index(number)
            predicted = _predict(vit.score_predictor[stage], x[:, prefix:], x.new_ones(ids.shape))
            scores = predicted[:, :, 0]
            best = scores.argsort(dim=1, descending=True)[:, : int(total * keep_ratios[stage])]
            all_scores.append(scores.gather(1, ids.argsort(dim=1)))
            ids = ids.gather(1, best)
            all_kept.append(ids)
            rows = [torch.cat([x[b, :prefix], x[b, prefix + best[b]]]) for b in range(len(x))]
            x = torch.stack(rows)
        x = _block(block, x, x.new_ones(x.shape[:2]), 0.0)
    return vit.head(vit.norm(x)[:, 0]), all_kept, all_scores


def slow_training(
    vit: Any, images: Tensor, noise: Sequence[Tensor], drop_loc: Sequence[int], eps: float = 0.0
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Run `vit` as in training, with Gumbel noise [B, N, 2] for each stage.

    `eps` is the constant that the published attention adds (1e-6 there).

    Returns the logits, the normalised patch tokens and the decisions of each stage.
    """
    x = vit._pos_embed(vit.patch_embed(images))
    prefix = vit.num_prefix_tokens
    left = x.new_ones(len(x), x.shape[1] - prefix)
    decisions = []
    for number, block in enumerate(vit.blocks):
        if number in drop_loc:
            stage = list(drop_loc).index(number)
            predicted = _predict(vit.score_predictor[stage], x[:, prefix:], left)
            soft = (predicted + noise[stage]).softmax(dim=2)
            winner = soft.argmax(dim=2, keepdim=True)
            hard = torch.zeros_like(soft).scatter(2, winner, 1.0)
            left = (hard - soft.detach() + soft)[:, :, 0] * left
            decisions.append(left)
        policy = torch.cat([left.new_ones(len(x), prefix), left], dim=1)
        x = _block(block, x, policy, eps)
    x = vit.norm(x)
    return vit.head(x[:, 0]), x[:, prefix:], decisions


def _predict(predictor: Any, x: Tensor, left: Tensor) -> Tensor:
    norm, linear, gelu = predictor.in_conv
    hidden = gelu(linear(norm(x)))
    half = hidden.shape[2] // 2
    total = sum(left[:, j, None] * hidden[:, j, half:] for j in range(left.shape[1]))
    # Where nothing is left the published mean is 0 / 0; ours is 0.
    mean = total / left.sum(dim=1, keepdim=True).clamp(min=1)
    mixed = torch.cat([hidden[:, :, :half], mean[:, None].repeat(1, hidden.shape[1], 1)], dim=2)
    for layer in list(predictor.out_conv)[:-1]:
        mixed = layer(mixed)
    return mixed - mixed.exp().sum(dim=2, keepdim=True).log()


def _block(block: Any, x: Tensor, policy: Tensor, eps: float) -> Tensor:
    attention, normed = block.attn, block.norm1(x)
    batch, num_tokens, _ = x.shape
    heads, width = attention.num_heads, attention.head_dim
    q, k, v = (
        part.reshape(batch, num_tokens, heads, width).transpose(1, 2)
        for part in attention.qkv(normed).chunk(3, dim=-1)
    )
    logits = q @ k.transpose(2, 3) / math.sqrt(width)
    logits = logits - logits.amax(dim=3, keepdim=True)
    # Everyone sees who is left, and itself.
    eye = torch.eye(num_tokens, dtype=x.dtype, device=x.device)
    sees = policy[:, None, None, :] * (1 - eye) + eye
    weights = logits.exp() * sees
    weights = (weights + eps / num_tokens) / (weights.sum(dim=3, keepdim=True) + eps)
    out = (weights @ v).transpose(1, 2).reshape(batch, num_tokens, heads * width)
    x = x + block.ls1(attention.proj(out))
    return x + block.ls2(block.mlp(block.norm2(x)))
