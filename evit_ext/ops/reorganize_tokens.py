"""`reorganize_tokens`: EViT's token reorganisation in one pass over the tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from evit_ext.ops import checks, library, reference


def reorganize_tokens(
    x: Tensor, scores: Tensor, num_keep: int, num_prefix_tokens: int = 1, fuse: bool = True
) -> tuple[Tensor, Tensor]:
    """Keep the `num_keep` patch tokens with the highest scores and fuse the others into one token.

    This is the step between attention and MLP in an EViT block (Liang et al., ICLR 2022, section 3.2). The
    fused token is ``Σ scores[b, j] * x[b, j]`` over the patch tokens j that are not kept.

    Args:
        x: tokens [B, N, C], float32, float16, bfloat16 or float64, any strides; the first
            P = `num_prefix_tokens` are prefix tokens (class, distillation, registers), always kept.
        scores: [B, N], for all tokens (those of prefix tokens are ignored), or [B, N − P], for the patch
            tokens only; any of these dtypes. Ties go to the lower index; NaN counts as the largest.
        num_keep: K, number of patch tokens to keep, in [1, N − P]. With K = N − P there is nothing to
            reorganise: the tokens come back unchanged, without a fused token.
        num_prefix_tokens: P, in [0, N).
        fuse: append the fused token; without it the other patch tokens are dropped.

    Returns:
        tokens [B, P + K + 1, C] ([B, P + K, C] without `fuse`), dtype of `x`: the prefix tokens, the kept
        tokens in their original order, the fused token, which is accumulated in float32 (float64 for float64
        `x`); and kept [B, K], int64, ascending: the numbers of the kept tokens among the patch tokens, so
        that ``x[b, P + kept[b, i]] == tokens[b, P + i]``.

    Differentiable once, in `x` and, if a token is fused, in `scores`. Deterministic for any number of
    threads.

    Raises:
        TypeError: a dtype is not supported, a number is not an int, or `fuse` is not a bool.
        ValueError: shapes or devices do not match, or `num_keep` or `num_prefix_tokens` is out of range.
    """
    checks.reorganize_tokens(x, scores, num_keep, num_prefix_tokens, fuse)
    if not library.runs_kernel(x, scores):
        return reference.reorganize_tokens(x, scores, num_keep, num_prefix_tokens, fuse)
    return torch.ops.evit.reorganize_tokens(x, scores, num_keep, num_prefix_tokens, fuse)


@torch.library.register_fake("evit::reorganize_tokens")
def _fake(
    x: Tensor, scores: Tensor, num_keep: int, num_prefix_tokens: int, fuse: bool
) -> tuple[Tensor, Tensor]:
    checks.reorganize_tokens(x, scores, num_keep, num_prefix_tokens, fuse)
    fused = 1 if fuse and num_keep != x.shape[1] - num_prefix_tokens else 0
    return (
        x.new_empty((x.shape[0], num_prefix_tokens + num_keep + fused, x.shape[2])),
        x.new_empty((x.shape[0], num_keep), dtype=torch.int64),
    )


@torch.library.register_fake("evit::reorganize_tokens_backward")
def _fake_backward(
    grad_tokens: Tensor, x: Tensor, scores: Tensor, kept: Tensor, num_prefix_tokens: int
) -> tuple[Tensor, Tensor]:
    checks.reorganize_tokens(x, scores, kept.shape[1], num_prefix_tokens, True)
    checks.same_device("grad_tokens", grad_tokens, "x", x)
    checks.same_device("kept", kept, "x", x)
    return x.new_empty(x.shape), scores.new_empty(scores.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, scores, num_keep, num_prefix_tokens, fuse = inputs
    ctx.num_prefix_tokens = num_prefix_tokens
    ctx.num_tokens = x.shape[1]
    ctx.fused = fuse and num_keep != x.shape[1] - num_prefix_tokens
    kept = output[1]
    # Without a fused token the gradient is a scatter, which needs neither x nor the scores.
    ctx.save_for_backward(*((x, scores, kept) if ctx.fused else (kept,)))


def _backward(
    ctx: Any, grad_tokens: Tensor, grad_kept: Tensor | None
) -> tuple[Tensor, Tensor | None, None, None, None]:
    if ctx.fused:
        x, scores, kept = ctx.saved_tensors
        grad_x, grad_scores = torch.ops.evit.reorganize_tokens_backward(
            grad_tokens, x, scores, kept, ctx.num_prefix_tokens
        )
        return grad_x, grad_scores, None, None, None
    (kept,) = ctx.saved_tensors
    prefix = torch.arange(ctx.num_prefix_tokens, device=kept.device).expand(kept.shape[0], -1)
    index = torch.cat([prefix, kept + ctx.num_prefix_tokens], dim=1)
    return torch.ops.evit.scatter_tokens(grad_tokens, index, ctx.num_tokens), None, None, None, None


torch.library.register_autograd("evit::reorganize_tokens", _backward, setup_context=_setup_context)
library.refuse_double_backward("reorganize_tokens")
