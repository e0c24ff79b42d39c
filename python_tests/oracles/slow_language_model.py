"""A language model with a vision tower that drops tokens, slowly."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def reduced(x: Tensor, scores: Tensor, prefix: int, rate: float, fuse: bool) -> Tensor:
    """The tokens [B, N, C] that are left, by scores [B, N]: one image at a time."""
    rows = []
    for tokens, score in zip(x, scores[:, prefix:], strict=True):
        patches = list(range(len(score)))
        keep = math.ceil(rate * len(patches))
        best = sorted(patches, key=lambda j, score=score: (-float(score[j]), j))[:keep]
        row = [tokens[:prefix]] + [tokens[prefix + j][None] for j in sorted(best)]
        if fuse and keep < len(patches):
            others = [j for j in patches if j not in best]
            row.append(sum(score[j] * tokens[prefix + j] for j in others)[None])  # type: ignore[union-attr]
        rows.append(torch.cat(row))
    return torch.stack(rows)


def features(
    tower: Any, pixels: Tensor, block: int, prefix: int, stages: dict[int, float], after: bool, fuse: bool
) -> Tensor:
    """What block number `block` of a tower of CLIP or SigLIP returns.

    `stages` has the keep rates of the blocks that reduce: after their MLP if `after`, else before it.
    """
    x = tower.embeddings(pixels)
    if hasattr(tower, "pre_layrnorm"):
        x = tower.pre_layrnorm(x)
    for number in range(block + 1):
        layer = tower.encoder.layers[number]
        normed, attention = layer.layer_norm1(x), layer.self_attn
        heads = attention.num_heads
        q, k, v = (
            part(normed).reshape(len(x), x.shape[1], heads, -1).transpose(1, 2)
            for part in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        weights = (q @ k.transpose(2, 3) / math.sqrt(q.shape[3])).softmax(dim=-1)
        x = x + attention.out_proj((weights @ v).transpose(1, 2).flatten(2))
        scores = (weights[:, :, 0] if prefix else weights.mean(dim=2)).mean(dim=1)
        if number in stages and not after:
            x = reduced(x, scores, prefix, stages[number], fuse)
        x = x + layer.mlp(layer.layer_norm2(x))
        if number in stages and after:
            x = reduced(x, scores, prefix, stages[number], fuse)
    return x


def packed(tokens: Tensor, tiles: tuple[int, int], newline: Tensor) -> Tensor:
    """The tokens of one image, given those of the whole and of its tiles [1 + tiles, M, C]."""
    rows, columns = tiles
    parts = list(tokens[0])
    for row in range(rows):
        for column in range(columns):
            parts += list(tokens[1 + row * columns + column])
        parts.append(newline)
    return torch.stack(parts)


def logits(model: Any, made: dict[str, Any], image_tokens: Tensor) -> Tensor:
    """The logits of an unchanged model, with these tokens of all images [L, C] in the placeholders."""
    ids = made["input_ids"]
    embedded = model.get_input_embeddings()(ids).clone()
    place = 0
    for b in range(ids.shape[0]):
        for n in range(ids.shape[1]):
            if ids[b, n] == model.config.image_token_id:
                embedded[b, n] = image_tokens[place]
                place += 1
    assert place == len(image_tokens)
    others = {name: made[name] for name in ("attention_mask", "token_type_ids") if name in made}
    out: Tensor = model(inputs_embeds=embedded, **others).logits
    return out
