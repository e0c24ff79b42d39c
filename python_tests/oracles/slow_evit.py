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
            x, best, fused = _keep_best(x, scores, keep_rates[list(drop_loc).index(number)], prefix, fuse)
            kept = ids.gather(1, best)
            all_kept.append(kept)
            # In the order of the patches, fused tokens last, which is the order of the package's tokens.
            order = ids.where(ids >= 0, ids.max() + 1).argsort(dim=1, stable=True)
            all_scores.append(scores.gather(1, order))
            ids = torch.cat([kept, kept.new_full((len(x), 1), -1)], dim=1) if fused else kept
        x = x + block.ls2(block.mlp(block.norm2(x)))
    return vit.forward_head(vit.norm(x)), all_kept, all_scores


def slow_lvvit(
    vit: Any,
    images: Tensor,
    keep_rates: Sequence[float] = (),
    drop_loc: Sequence[int] = (),
    fuse: bool = True,
    skip_lam: float = 2.0,
    exchanged: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run the LV-ViT `vit` in the mode it is in, as an EViT, from its parameters alone.

    With `exchanged`, a bool grid of patches, these are exchanged between images b and B - 1 - b.

    Returns the logits of inference, those of the class token, those of the tokens after it [B, K, classes],
    and which patches these are [B, K], -1 for fused tokens; in the order of their scores.
    """
    p, buffers = dict(vit.named_parameters()), dict(vit.named_buffers())

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ p[f"{name}.weight"].T + p.get(f"{name}.bias", 0)

    def layer_norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(dim=-1, keepdim=True)
        normed = centred / (centred.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt()
        return normed * p[f"{name}.weight"] + p[f"{name}.bias"]

    def batch_norm_relu(x: Tensor, name: str) -> Tensor:
        if vit.training:
            mean = x.mean(dim=(0, 2, 3))
            variance = x.var(dim=(0, 2, 3), correction=0)
        else:
            mean, variance = buffers[f"{name}.running_mean"], buffers[f"{name}.running_var"]
        scale = p[f"{name}.weight"] / (variance + 1e-5).sqrt()
        x = (x - mean[:, None, None]) * scale[:, None, None] + p[f"{name}.bias"][:, None, None]
        return x.clamp(min=0)

    x = torch.conv2d(images, p["patch_embed.conv1.weight"], stride=2, padding=3)
    x = batch_norm_relu(x, "patch_embed.bn1")
    x = batch_norm_relu(torch.conv2d(x, p["patch_embed.conv2.weight"], padding=1), "patch_embed.bn2")
    x = batch_norm_relu(torch.conv2d(x, p["patch_embed.conv3.weight"], padding=1), "patch_embed.bn3")
    kernel = p["patch_embed.proj.weight"]
    x = torch.conv2d(x, kernel, p["patch_embed.proj.bias"], stride=kernel.shape[2])
    batch, width, rows, columns = x.shape
    if exchanged is not None:
        mixed = x.clone()
        for row, column in exchanged.nonzero().tolist():
            for b in range(batch):
                mixed[b, :, row, column] = x[batch - 1 - b, :, row, column]
        x = mixed
    x = torch.cat([p["cls_token"].repeat(batch, 1, 1), x.flatten(2).transpose(1, 2)], dim=1)
    embedding = p["pos_embed"][0]
    if len(embedding) != x.shape[1]:
        embedding = torch.cat([embedding[:1], slow_bicubic(embedding[1:], rows, columns)])
    x = x + embedding
    ids = torch.arange(rows * columns).repeat(batch, 1)
    for number in range(len(vit.blocks)):
        block = f"blocks.{number}"
        heads = vit.blocks[number].attn.num_heads
        packed = linear(layer_norm(x, f"{block}.norm1"), f"{block}.attn.qkv")
        q, k, v = (
            part.reshape(batch, -1, heads, width // heads).transpose(1, 2) for part in packed.chunk(3, dim=-1)
        )
        probabilities = (q @ k.transpose(2, 3) / math.sqrt(width // heads)).softmax(dim=-1)
        attended = (probabilities @ v).transpose(1, 2).reshape(batch, -1, width)
        x = x + linear(attended, f"{block}.attn.proj") / skip_lam
        if number in drop_loc:
            scores = probabilities[:, :, 0, 1:].mean(dim=1)
            x, best, fused = _keep_best(x, scores, keep_rates[list(drop_loc).index(number)], 1, fuse)
            ids = ids.gather(1, best)
            ids = torch.cat([ids, ids.new_full((batch, 1), -1)], dim=1) if fused else ids
        hidden = torch.nn.functional.gelu(linear(layer_norm(x, f"{block}.norm2"), f"{block}.mlp.fc1"))
        x = x + linear(hidden, f"{block}.mlp.fc2") / skip_lam
    x = layer_norm(x, "norm")
    logits, aux_logits = linear(x[:, 0], "head"), linear(x[:, 1:], "aux_head")
    rows_of_logits = []
    for b in range(batch):
        of_patches = [aux_logits[b, j] for j in range(ids.shape[1]) if ids[b, j] >= 0]
        best_logits = torch.stack(of_patches).max(dim=0).values if of_patches else 0
        rows_of_logits.append(logits[b] + best_logits / 2)
    return torch.stack(rows_of_logits), logits, aux_logits, ids


def _keep_best(
    x: Tensor, scores: Tensor, keep_rate: float, prefix: int, fuse: bool
) -> tuple[Tensor, Tensor, bool]:
    """Return the tokens that are left, which patch tokens [B, K] were kept, and whether one was fused."""
    keep = math.ceil(keep_rate * scores.shape[1])
    best = scores.topk(keep, dim=1).indices
    rows = []
    for b in range(len(x)):
        chosen = set(best[b].tolist())
        others = [j for j in range(scores.shape[1]) if j not in chosen]
        row = [x[b, :prefix], x[b, [prefix + j for j in best[b].tolist()]]]
        if fuse and others:
            row.append(sum(scores[b, j] * x[b, prefix + j] for j in others).unsqueeze(0))
        rows.append(torch.cat(row))
    return torch.stack(rows), best, fuse and keep < scores.shape[1]


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
