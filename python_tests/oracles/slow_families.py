"""Every supported family of models as an EViT, a second time, slowly: the oracle of the tests in this folder.

It shares no code with the package, forms the attention map, and takes what it needs from the plain model's
parameters: projections, rotations and biases are written out. Tokens stand in the order of their scores, as
the published code leaves them, and each knows its place on the grid of patches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from slow_evit import _keep_best
from torch import Tensor

FUSED = -1


class SlowRun(NamedTuple):
    """What a forward gives.

    Attributes:
        logits: [B, classes].
        kept: for each stage the patches it kept [B, K], in the order of their scores; -1 for a fused token.
        scores: for each stage the scores [B, N - P] of the patch tokens that entered it, in the order of the
            patches, fused tokens last.
    """

    logits: Tensor
    kept: list[Tensor]
    scores: list[Tensor]


def slow_family(
    vit: Any, images: Tensor, keep_rates: Sequence[float], drop_loc: Sequence[int], fuse: bool = True
) -> SlowRun:
    """Run the plain model `vit` as an EViT.

    In training mode patch dropout is the only random thing that is known; it draws as timm does.
    """
    x, prefix, places, grid = _embed(vit, images)
    rope = getattr(vit, "rope", None)
    rotations = None if rope is None else rope.get_embed(shape=list(grid))
    if vit.training:
        x, places = _drop_patches(vit, x, prefix, places)
    # Patches have two numbers: their place on the grid, and the one they have as they enter the first block.
    numbers = torch.arange(places.shape[1]).repeat(len(x), 1)
    x = vit.norm_pre(x) if hasattr(vit, "norm_pre") else x
    all_kept, all_scores = [], []
    for number, block in enumerate(vit.blocks):
        after = type(block).__name__ in ("ResPostBlock", "EvaBlockPostNorm")  # norms after the branches
        rotation = rotations[number] if rotations is not None and rotations.dim() == 4 else rotations
        bias = _biases(vit, block.attn, places, grid)
        attended, probabilities = _attention(
            block.attn, x if after else block.norm1(x), prefix, places, rotation, bias
        )
        x = x + (block.norm1(attended) if after else _scaled(block, 1, attended))
        if number in drop_loc:
            has_class_token = getattr(vit, "cls_token", None) is not None
            paid = probabilities[:, :, 0] if has_class_token else probabilities.mean(dim=2)
            scores = paid.mean(dim=1)[:, prefix:]
            x, best, fused = _keep_best(x, scores, keep_rates[list(drop_loc).index(number)], prefix, fuse)
            all_kept.append(numbers.gather(1, best))
            order = numbers.where(numbers != FUSED, numbers.max() + 1).argsort(dim=1, stable=True)
            all_scores.append(scores.gather(1, order))
            numbers, places = (
                F.pad(ids.gather(1, best), (0, int(fused)), value=FUSED) for ids in (numbers, places)
            )
        x = x + (block.norm2(block.mlp(x)) if after else _scaled(block, 2, block.mlp(block.norm2(x))))
    x = vit.norm(x)
    return SlowRun(_head(vit, x, prefix, numbers), all_kept, all_scores)


def _embed(vit: Any, images: Tensor) -> tuple[Tensor, int, Tensor, tuple[int, int]]:
    """Return the embedded tokens [B, N, C], P, the places [B, N - P] of the patches, and the grid."""
    patches = vit.patch_embed(images)
    grid = vit.patch_embed.grid_size
    position = vit.pos_embed
    if patches.dim() == 4:  # another size than the model's: [B, height, width, C]
        old, grid = grid, (patches.shape[1], patches.shape[2])
        patches = patches.flatten(1, 2)
        if position is not None and grid != tuple(old):
            count = position.shape[1] - old[0] * old[1]
            of_grid = position[:, count:].reshape(1, *old, -1).permute(0, 3, 1, 2).float()  # as timm does
            of_grid = F.interpolate(of_grid, size=grid, mode="bicubic", antialias=True)
            of_grid = of_grid.flatten(2).transpose(1, 2).to(position.dtype)
            position = torch.cat([position[:, :count], of_grid], dim=1)
    names = ("cls_token", "dist_token", "reg_token")
    tokens = [token for name in names if (token := getattr(vit, name, None)) is not None]
    prefix = sum(token.shape[1] for token in tokens)
    x = torch.cat([*(token.repeat(len(images), 1, 1) for token in tokens), patches], dim=1)
    if position is not None:
        without = x.shape[1] - position.shape[1]  # prefix tokens may have no position
        x = x + F.pad(position, (0, 0, without, 0))
    places = torch.arange(grid[0] * grid[1]).repeat(len(images), 1)
    return x, prefix, places, grid


def _drop_patches(vit: Any, x: Tensor, prefix: int, places: Tensor) -> tuple[Tensor, Tensor]:
    """Drop patches at random as timm does in training; see :func:`_embed`."""
    rate = getattr(getattr(vit, "patch_drop", None), "prob", 0.0)
    if rate == 0:
        return x, places
    batch, count = places.shape
    left = torch.argsort(torch.randn(batch, count), dim=-1)[:, : int(count * (1 - rate))]
    rows = [torch.cat([x[b, :prefix], x[b, prefix:][left[b]]]) for b in range(batch)]
    return torch.stack(rows), left


def _scaled(block: Any, number: int, branch: Tensor) -> Tensor:
    """Return the first or second branch of `block` times its layer scale, under either of its names."""
    if hasattr(block, f"ls{number}"):
        return getattr(block, f"ls{number}")(branch)
    gamma = getattr(block, f"gamma_{number}")
    return branch if gamma is None else gamma * branch


def _linear(x: Tensor, layer: Any) -> Tensor:
    out = x @ layer.weight.T
    return out if layer.bias is None else out + layer.bias


def _attention(
    attention: Any, x: Tensor, prefix: int, places: Tensor, rotation: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the attention's output [B, N, C] and its map [B, H, N, N]."""
    outs, maps = [], []
    for head, (query, key, value) in enumerate(_projected(attention, x, prefix, places, rotation)):
        products = torch.einsum("bqd,bkd->bqk", query, key) / query.shape[2] ** 0.5
        maps.append((products if bias is None else products + bias[:, head]).softmax(dim=-1))
        outs.append(torch.einsum("bqk,bkd->bqd", maps[-1], value))
    out = torch.cat(outs, dim=-1)
    if getattr(attention, "norm", None) is not None:
        out = attention.norm(out)
    if getattr(attention, "gate", None) is not None:
        out = out / (1 + torch.exp(-_linear(x, attention.gate)))
    return _linear(out, attention.proj), torch.stack(maps, dim=1)


def _projected(
    attention: Any, x: Tensor, prefix: int, places: Tensor, rotation: Tensor | None
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return queries, keys and values [B, N, D] of each head, as the attention multiplies them."""
    heads = attention.num_heads
    if attention.qkv is not None:
        parts = list(_linear(x, attention.qkv).chunk(3, dim=-1))
        if getattr(attention, "q_bias", None) is not None:
            biases = (attention.q_bias, attention.k_bias, attention.v_bias)
            parts = [part + own for part, own in zip(parts, biases, strict=True)]
    else:
        parts = [_linear(x, layer) for layer in (attention.q_proj, attention.k_proj, attention.v_proj)]
    width = parts[0].shape[-1] // heads
    q, k, v = ([part[..., i : i + width] for i in range(0, part.shape[-1], width)] for part in parts)
    half = getattr(attention, "rotate_half", False)
    of_heads = []
    for head in range(heads):
        of_keys = head * len(k) // heads  # fewer heads of keys and values than of queries, perhaps
        query, key = q[head], k[of_keys]
        if getattr(attention, "q_norm", None) is not None:
            query, key = attention.q_norm(query), attention.k_norm(key)
        if rotation is not None:
            # Rotations of each head, or of all alike. Those of keys that heads share are alike, too.
            of_head = rotation[head] if rotation.dim() == 3 else rotation
            query, key = (_rotated(t, prefix, places, of_head, half) for t in (query, key))
        of_heads.append((query, key, v[of_keys]))
    return of_heads


def _rotated(x: Tensor, prefix: int, places: Tensor, rotation: Tensor, half: bool) -> Tensor:
    """Return queries or keys [B, N, D] of one head, those of patches turned as their places say.

    `rotation` [patches, 2 D] has the sines first. Turned are pairs of channels, which stand together or are
    halves apart.
    """
    sines, cosines = rotation.to(x.dtype).chunk(2, dim=-1)
    width = x.shape[2]
    firsts, apart = (range(width // 2), width // 2) if half else (range(0, width, 2), 1)
    rows = []
    for b in range(len(x)):
        turned = [x[b, :, c] for c in range(width)]
        for i in firsts:
            j = i + apart
            # Of each token: its patch's angle. Prefix and fused tokens are turned by none.
            patch = F.pad(places[b], (prefix, 0), value=FUSED)
            known = patch != FUSED
            patch = patch.clamp(min=0)
            sine = [torch.where(known, sines[patch, c], 0.0) for c in (i, j)]
            cosine = [torch.where(known, cosines[patch, c], 1.0) for c in (i, j)]
            first, second = x[b, :, i], x[b, :, j]
            turned[i] = first * cosine[0] - second * sine[0]
            turned[j] = second * cosine[1] + first * sine[1]
        rows.append(torch.stack(turned, dim=-1))
    return torch.stack(rows)


def _biases(vit: Any, attention: Any, places: Tensor, grid: tuple[int, int]) -> Tensor | None:
    """Return the sum of the relative position biases [B, H, N, N] of a BEiT's block; None without any."""
    shared = getattr(vit, "rel_pos_bias", None)
    tables = [
        owner.relative_position_bias_table
        for owner in (attention, shared)
        if getattr(owner, "relative_position_bias_table", None) is not None
    ]
    if not tables:
        return None
    height, width = grid
    # The last three rows of a table: from the class token, to it, and from it to itself.
    from_class, to_class, alone = (len(tables[0]) - left for left in (3, 2, 1))
    batch = []
    for row in F.pad(places, (1, 0), value=FUSED).tolist():
        entries = []
        for query in row:
            for key in row:
                if query == FUSED:
                    entries.append(alone if key == FUSED else from_class)
                elif key == FUSED:
                    entries.append(to_class)
                else:
                    down = query // width - key // width + height - 1
                    right = query % width - key % width + width - 1
                    entries.append(down * (2 * width - 1) + right)
        batch.append(torch.tensor(entries).reshape(len(row), len(row)))
    chosen = torch.stack(batch)
    return sum(table[chosen] for table in tables).permute(0, 3, 1, 2)


def _head(vit: Any, x: Tensor, prefix: int, numbers: Tensor) -> Tensor:
    """Return the logits [B, classes] of the last tokens."""
    if getattr(vit, "aux_head", None) is None:
        return vit.forward_head(x)
    # LV-ViT: half the largest logit that any patch has, fused tokens left out.
    of_patches = _linear(x[:, prefix:], vit.aux_head)
    of_patches = of_patches.masked_fill((numbers == FUSED).unsqueeze(-1), -torch.inf)
    return _linear(x[:, 0], vit.head) + of_patches.amax(dim=1) / 2
