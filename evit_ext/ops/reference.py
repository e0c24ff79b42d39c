"""Every operator of :mod:`evit_ext.ops` in plain PyTorch, with the same names and signatures.

The reference serves three purposes: it defines what each operator computes, the tests compare against it, and
it runs on devices for which no kernel is built. It is differentiable through ordinary autograd, accumulates
in float32 (float64 for float64 inputs) and checks its arguments as the operators do.

Notation: B batch, H heads, N tokens, P prefix tokens, K kept patches, C channels, D channels per head.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from evit_ext.ops import checks
from evit_ext.ops.checks import accumulation_dtype


def _has_autocast(device: torch.device) -> bool:
    return device.type in checks.AUTOCAST_DEVICES


def class_attention(
    q: Tensor, k: Tensor, scale: float | None = None, logsumexp: Tensor | None = None
) -> Tensor:
    """Mean over heads of softmax(q · kᵀ · scale). See :func:`evit_ext.ops.class_attention`."""
    scale = checks.class_attention(q, k, scale, logsumexp)
    accumulate = accumulation_dtype(q.dtype)
    # Autocast would compute the products in low precision again.
    with torch.autocast(q.device.type, enabled=False) if _has_autocast(q.device) else nullcontext():
        logits = torch.einsum("bhd,bhnd->bhn", q.to(accumulate), k.to(accumulate)) * scale
        if logsumexp is None:
            return logits.softmax(dim=-1).mean(dim=1)
        # `zero` has the value 0 but the gradient of the computed logsumexp: the given one is a constant.
        own = logits.logsumexp(dim=-1)
        zero = torch.nan_to_num(own - own.detach())
        return (logits - (logsumexp.detach() + zero).unsqueeze(-1)).exp().mean(dim=1)


def mean_attention(q: Tensor, k: Tensor, scale: float | None = None) -> Tensor:
    """Mean over heads and queries of softmax(q · kᵀ · scale). See :func:`evit_ext.ops.mean_attention`."""
    scale = checks.mean_attention(q, k, scale)
    accumulate = accumulation_dtype(q.dtype)
    with torch.autocast(q.device.type, enabled=False) if _has_autocast(q.device) else nullcontext():
        logits = q.to(accumulate) @ k.to(accumulate).transpose(2, 3) * scale
        return logits.softmax(dim=-1).mean(dim=(1, 2))


def attention_with_scores(
    qkv: Tensor,
    num_heads: int,
    scale: float | None = None,
    key_bias: Tensor | None = None,
    mean: bool = False,
) -> tuple[Tensor, Tensor]:
    """Attention and the first token's scores. See :func:`evit_ext.ops.attention_with_scores`."""
    scale = checks.attention_with_scores(qkv, num_heads, scale, key_bias, mean)
    q, k, v = unpacked(qkv.to(accumulation_dtype(qkv.dtype)), num_heads)
    with torch.autocast(qkv.device.type, enabled=False) if _has_autocast(qkv.device) else nullcontext():
        logits = q @ k.transpose(2, 3) * scale
        if key_bias is not None:
            logits = logits + key_bias.to(logits.dtype)[:, None, None]
        attention = logits.softmax(dim=-1)
        out = (attention @ v).transpose(1, 2).flatten(2)
    if mean and qkv.shape[1] > 0:
        return out.to(qkv.dtype), attention.mean(dim=(1, 2))
    return out.to(qkv.dtype), attention[:, :, :1].sum(dim=2).mean(dim=1)


def unpacked(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values [B, H, N, D] as views of `qkv` [B, N, 3 * H * D]."""
    q, k, v = qkv.unflatten(2, (3, num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    """Rows `index` of `x`. See :func:`evit_ext.ops.gather_tokens`."""
    checks.gather_tokens(x, index)
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[2]))


def scatter_tokens(x: Tensor, index: Tensor, num_tokens: int) -> Tensor:
    """Rows of `x` at the places `index`, zeros elsewhere. See :func:`evit_ext.ops.scatter_tokens`."""
    checks.scatter_tokens(x, index, num_tokens)
    accumulate = accumulation_dtype(x.dtype)
    out = torch.zeros(x.shape[0], num_tokens, x.shape[2], dtype=accumulate, device=x.device)
    out = out.scatter_add(1, index.unsqueeze(-1).expand(-1, -1, x.shape[2]), x.to(accumulate))
    return out.to(x.dtype)


def fuse_tokens(x: Tensor, weights: Tensor, index: Tensor) -> Tensor:
    """Sum over `index` of weights · x. See :func:`evit_ext.ops.fuse_tokens`."""
    checks.fuse_tokens(x, weights, index)
    accumulate = accumulation_dtype(x.dtype)
    rows = x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[2])).to(accumulate)
    return (rows * weights.gather(1, index).to(accumulate).unsqueeze(-1)).sum(dim=1).to(x.dtype)


def merge_tokens(
    x: Tensor, owner: Tensor, num_out: int, weights: Tensor | None = None, num_prefix_tokens: int = 1
) -> tuple[Tensor, Tensor]:
    """Averages of the tokens with one owner. See :func:`evit_ext.ops.merge_tokens`."""
    checks.merge_tokens(x, owner, num_out, weights, num_prefix_tokens)
    accumulate = accumulation_dtype(x.dtype)
    patches = x[:, num_prefix_tokens:].to(accumulate)
    weights = patches.new_ones(owner.shape) if weights is None else weights.to(accumulate)
    nothing = weights.new_zeros(owner.shape[0], num_out)
    totals = nothing.scatter_add(1, owner, weights)
    is_alone = nothing.scatter_add(1, owner, torch.ones_like(weights)).gather(1, owner) == 1
    # Divided by 1 where one is alone, as its total may be 0, of which a gradient would be NaN.
    shares = torch.where(is_alone, 1.0, weights / torch.where(is_alone, 1.0, totals.gather(1, owner)))
    places = owner.unsqueeze(-1).expand_as(patches)
    merged = patches.new_zeros(x.shape[0], num_out, x.shape[2])
    merged = merged.scatter_add(1, places, patches * shares.unsqueeze(-1))
    return torch.cat([x[:, :num_prefix_tokens], merged.to(x.dtype)], dim=1), totals


def bipartite_matching(keys: Tensor, num_out: int) -> tuple[Tensor, Tensor]:
    """ToMe's matching. See :func:`evit_ext.ops.bipartite_matching`."""
    checks.bipartite_matching(keys, num_out)
    batch, _, num_tokens, _ = keys.shape
    if num_out == num_tokens:
        every = torch.arange(num_tokens, device=keys.device).repeat(batch, 1)
        return every, every.clone()
    with torch.no_grad(), checks.without_autocast(keys.device.type):
        metric = F.normalize(keys.to(accumulation_dtype(keys.dtype)).mean(dim=1), dim=-1)
        similarity, partner = (metric[:, ::2] @ metric[:, 1::2].transpose(1, 2)).max(dim=-1)
        order = similarity.sort(dim=1, descending=True, stable=True).indices
    merged = order[:, : num_tokens - num_out]
    goes = torch.zeros(batch, num_tokens, dtype=torch.bool, device=keys.device).scatter(1, 2 * merged, True)
    places = (~goes).to(torch.int64).cumsum(dim=1) - 1
    of_partner = places.gather(1, 2 * partner + 1)
    # Of a partner's place as often as of a token's: those of B stay, and their own place is not read.
    owner = torch.where(goes, of_partner.repeat_interleave(2, dim=1)[:, :num_tokens], places)
    kept = goes.to(torch.int64).sort(dim=1, stable=True).indices[:, :num_out]
    return kept, owner


def reorganize_tokens(
    x: Tensor, scores: Tensor, num_keep: int, num_prefix_tokens: int = 1, fuse: bool = True
) -> tuple[Tensor, Tensor]:
    """Keep the best patches, fuse the others. See :func:`evit_ext.ops.reorganize_tokens`."""
    checks.reorganize_tokens(x, scores, num_keep, num_prefix_tokens, fuse)
    num_patches = x.shape[1] - num_prefix_tokens
    patch_scores = scores[:, scores.shape[1] - num_patches :]
    if num_keep == num_patches:
        kept = torch.arange(num_patches, device=x.device).expand(x.shape[0], -1).contiguous()
        return x.clone(memory_format=torch.contiguous_format), kept
    # A stable descending sort: ties go to the lower index, NaN counts as the largest.
    order = patch_scores.detach().sort(dim=1, descending=True, stable=True).indices
    kept = order[:, :num_keep].sort(dim=1).values
    patches = x[:, num_prefix_tokens:]
    parts = [x[:, :num_prefix_tokens], gather_tokens(patches, kept)]
    if fuse:
        others = order[:, num_keep:].sort(dim=1).values
        parts.append(fuse_tokens(patches, patch_scores, others).unsqueeze(1))
    return torch.cat(parts, dim=1), kept


def restore_tokens(
    tokens: Tensor,
    kept: Tensor,
    num_patches: int,
    num_prefix_tokens: int = 1,
    fill: str | Tensor = "fused",
) -> Tensor:
    """Put every patch back in its place. See :func:`evit_ext.ops.restore_tokens`."""
    checks.restore_tokens(tokens, kept, num_patches, num_prefix_tokens, fill)
    num_kept = kept.shape[1]
    prefix, patches = tokens[:, :num_prefix_tokens], tokens[:, num_prefix_tokens:]
    if isinstance(fill, Tensor):
        filling = fill[:, num_prefix_tokens:]
    elif fill == "fused" and num_kept != num_patches:
        # Copied in the accumulation dtype, so that the gradients of the copies are summed in it.
        fused = patches[:, num_kept:].to(accumulation_dtype(tokens.dtype))
        filling = fused.expand(-1, num_patches, -1).to(tokens.dtype)
    else:
        filling = tokens.new_zeros(tokens.shape[0], num_patches, tokens.shape[2])
    index = kept.unsqueeze(-1).expand(-1, -1, tokens.shape[2])
    return torch.cat([prefix, filling.scatter(1, index, patches[:, :num_kept])], dim=1)


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
    """Reorganise x + branch and normalise the result. See :func:`evit_ext.ops.add_reorganize_norm`."""
    eps = checks.add_reorganize_norm(x, branch, scores, num_keep, weight, bias, eps, num_prefix_tokens, fuse)
    tokens, kept = reorganize_tokens(x + branch, scores, num_keep, num_prefix_tokens, fuse)
    accumulate = accumulation_dtype(x.dtype)
    normed = F.layer_norm(
        tokens.to(accumulate),
        (tokens.shape[2],),
        weight if weight is None else weight.to(accumulate),
        bias if bias is None else bias.to(accumulate),
        eps,
    )
    return tokens, normed.to(x.dtype), kept
