"""`add_reorganize_norm`: residual sum, token reorganisation and LayerNorm in one pass, for inference."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from evit_ext.ops import checks, library, reference
from evit_ext.ops.reorganize_tokens import reorganize_tokens


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
    """Add a residual branch, keep the best patch tokens, fuse the others and normalise the result.

    This is what an EViT block does between its attention and its MLP (Liang et al., ICLR 2022, section 3.2)::

        tokens, kept = reorganize_tokens(x + branch, scores, num_keep, num_prefix_tokens, fuse)
        normed = layer_norm(tokens, weight, bias, eps)

    It avoids a pass over memory for each step: rows that are not kept are never written. If a gradient is
    needed, these steps run instead of the kernel.

    Args:
        x: tokens [B, N, C] with C at least 1, float32, float16, bfloat16 or float64, any strides; the first
            P = `num_prefix_tokens` are prefix tokens, always kept.
        branch: added to `x`, such as the output of attention; shape and dtype of `x`, any strides.
        scores: [B, N] or [B, N − P], as for :func:`reorganize_tokens`.
        num_keep: K, number of patch tokens to keep, in [1, N − P]; with K = N − P all tokens stay, and there
            is no fused token.
        weight: of the LayerNorm (Ba et al., 2016), [C] in the dtype of `x`; None means 1.
        bias: of the LayerNorm, [C] in the dtype of `x`; None means 0.
        eps: added to the variance, at least 0.
        num_prefix_tokens: P, in [0, N).
        fuse: append the fused token; without it the other patch tokens are dropped.

    Returns:
        tokens [B, P + K + 1, C] ([B, P + K, C] without `fuse`), dtype of `x`: bit-identical to
        :func:`reorganize_tokens` of ``x + branch``; normed, of the same shape and dtype: mean and variance
        are computed in float32 (float64 for float64 `x`) from the rounded tokens; and kept [B, K], int64,
        ascending.

    Autocast changes nothing: the results have the dtype of `x` and `branch`, whereas PyTorch's LayerNorm
    would return float32. Differentiable once in all floating tensors (in `scores`, those that are fused). The
    kernel is deterministic for any number of threads; the gradient of `weight` and `bias` is PyTorch's.

    Raises:
        TypeError: a dtype is not supported or differs from that of `x`, a number has another type, or `fuse`
            is not a bool.
        ValueError: shapes or devices do not fit, a number is out of range, or C is 0.
    """
    eps = checks.add_reorganize_norm(x, branch, scores, num_keep, weight, bias, eps, num_prefix_tokens, fuse)
    tensors = [t for t in (x, branch, scores, weight, bias) if t is not None]
    if not library.runs_kernel(*tensors):
        return reference.add_reorganize_norm(
            x, branch, scores, num_keep, weight, bias, eps, num_prefix_tokens, fuse
        )
    if library.needs_gradient(*tensors):
        tokens, kept = reorganize_tokens(x + branch, scores, num_keep, num_prefix_tokens, fuse)
        # Under autocast, layer_norm may return float32.
        normed = F.layer_norm(tokens, (tokens.shape[2],), weight, bias, eps).to(x.dtype)
        return tokens, normed, kept
    return torch.ops.evit.add_reorganize_norm(
        x, branch, scores, num_keep, weight, bias, eps, num_prefix_tokens, fuse
    )


@torch.library.register_fake("evit::add_reorganize_norm")
def _fake(
    x: Tensor,
    branch: Tensor,
    scores: Tensor,
    num_keep: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    num_prefix_tokens: int,
    fuse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    checks.add_reorganize_norm(x, branch, scores, num_keep, weight, bias, eps, num_prefix_tokens, fuse)
    fused = 1 if fuse and num_keep != x.shape[1] - num_prefix_tokens else 0
    shape = (x.shape[0], num_prefix_tokens + num_keep + fused, x.shape[2])
    return x.new_empty(shape), x.new_empty(shape), x.new_empty((x.shape[0], num_keep), dtype=torch.int64)


library.refuse_gradient(
    "add_reorganize_norm",
    "torch.ops.evit.add_reorganize_norm has no gradient: call evit_ext.ops.add_reorganize_norm, which is "
    "differentiable, or evit_ext.ops.reference.add_reorganize_norm",
)
