"""`restore_tokens`: every patch back in its place, for dense tasks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from evit_ext.ops import checks, library, reference


def restore_tokens(
    tokens: Tensor,
    kept: Tensor,
    num_patches: int,
    num_prefix_tokens: int = 1,
    fill: str | Tensor = "fused",
) -> Tensor:
    """Put the tokens that :func:`reorganize_tokens` kept back on the grid, and fill the gaps.

    Dense tasks need this after a network has dropped tokens. The result has the prefix tokens, then a token
    for every patch: ``tokens[b, P + i]`` for patch ``kept[b, i]``, and the filling for dropped patches.

    Args:
        tokens: [B, P + K, C], or [B, P + K + 1, C] with a fused token last; float32, float16, bfloat16 or
            float64, any strides.
        kept: [B, K], int64, strictly ascending, each in [0, `num_patches`): the numbers of the kept tokens
            among the patches, as :func:`reorganize_tokens` returns them. K may be 0.
        num_patches: number of patches before any was dropped, at least K.
        num_prefix_tokens: P, at least 0.
        fill: the value for dropped patches. "fused": the fused token, which must be present, or absent if
            K = `num_patches`. "zero": zeros. A tensor [B, P + `num_patches`, C], dtype of `tokens`, any
            strides: the tensor's token for that patch, such as the one before dropping. With these two, a
            fused token is ignored and its gradient is zero.

    Returns:
        [B, P + `num_patches`, C], contiguous, dtype of `tokens`.

    Differentiable in `tokens` and in a tensor `fill`, any number of times. With "fused", the gradient of the
    fused token is the sum over the dropped patches, computed in float32 (float64 for float64). Deterministic
    for any number of threads.

    Raises:
        TypeError: a dtype is not supported, `kept` is not int64, a number is not an int, or `fill` has
            another type or a dtype different from that of `tokens`.
        ValueError: shapes or devices do not match, a number is out of range, `fill` is another string, there
            is no fused token to fill with, or `kept` does not ascend (CPU tensors, outside of tracing).
        IndexError: a number in `kept` is out of range (CPU tensors, outside of tracing).
    """
    checks.restore_tokens(tokens, kept, num_patches, num_prefix_tokens, fill)
    given = fill if isinstance(fill, Tensor) else None
    if not library.runs_kernel(tokens, *(() if given is None else (given,))):
        return reference.restore_tokens(tokens, kept, num_patches, num_prefix_tokens, fill)
    fill_fused = given is None and fill == "fused" and kept.shape[1] != num_patches
    return torch.ops.evit.restore_tokens(tokens, kept, num_patches, num_prefix_tokens, fill_fused, given)


@torch.library.register_fake("evit::restore_tokens")
def _fake(
    tokens: Tensor,
    kept: Tensor,
    num_patches: int,
    num_prefix_tokens: int,
    fill_fused: bool,
    fill: Tensor | None = None,
) -> Tensor:
    word = "fused" if fill_fused else "zero"
    checks.restore_tokens(tokens, kept, num_patches, num_prefix_tokens, word if fill is None else fill)
    return tokens.new_empty((tokens.shape[0], num_prefix_tokens + num_patches, tokens.shape[2]))


@torch.library.register_fake("evit::restore_tokens_backward")
def _fake_backward(
    grad: Tensor, kept: Tensor, num_tokens: int, num_prefix_tokens: int, fill_fused: bool
) -> Tensor:
    checks.same_device("grad", grad, "kept", kept)
    return grad.new_empty((grad.shape[0], num_tokens, grad.shape[2]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tokens, kept, _, ctx.num_prefix_tokens, ctx.fill_fused, fill = inputs
    ctx.num_tokens = tokens.shape[1]
    ctx.has_fill = fill is not None
    ctx.save_for_backward(kept)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, None, None, Tensor | None]:
    (kept,) = ctx.saved_tensors
    grad_tokens = grad_fill = None
    if ctx.needs_input_grad[0]:
        grad_tokens = torch.ops.evit.restore_tokens_backward(
            grad, kept, ctx.num_tokens, ctx.num_prefix_tokens, ctx.fill_fused
        )
    if ctx.has_fill and ctx.needs_input_grad[5]:
        # The gradient, with zeros for the tokens that did not come from `fill`: one row of zeros, expanded.
        num_kept = ctx.num_prefix_tokens + kept.shape[1]
        zeros = grad.new_zeros((1, 1, grad.shape[2])).expand(grad.shape[0], num_kept, -1)
        num_patches = grad.shape[1] - ctx.num_prefix_tokens
        grad_fill = torch.ops.evit.restore_tokens(
            zeros, kept, num_patches, ctx.num_prefix_tokens, False, grad
        )
    return grad_tokens, None, None, None, None, grad_fill


def _setup_backward_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, kept, _, ctx.num_prefix_tokens, ctx.fill_fused = inputs
    ctx.num_patches = grad.shape[1] - ctx.num_prefix_tokens
    ctx.save_for_backward(kept)


def _double_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
    (kept,) = ctx.saved_tensors
    grad_grad = torch.ops.evit.restore_tokens(
        grad, kept, ctx.num_patches, ctx.num_prefix_tokens, ctx.fill_fused, None
    )
    return grad_grad, None, None, None, None


torch.library.register_autograd("evit::restore_tokens", _backward, setup_context=_setup_context)
torch.library.register_autograd(
    "evit::restore_tokens_backward", _double_backward, setup_context=_setup_backward_context
)
