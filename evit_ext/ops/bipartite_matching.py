"""`bipartite_matching`: which tokens are merged into which, by ToMe's rule."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from evit_ext.ops import checks, library, reference


def bipartite_matching(keys: Tensor, num_out: int) -> tuple[Tensor, Tensor]:
    """Return which tokens stay and which of these each token becomes part of.

    "Bipartite soft matching" of Bolya et al., ICLR 2023 (arXiv 2210.09461), section 3.1. Tokens are dealt
    alternately to two sets, A (the first, the third, …) and B. Each of A has as its partner the token of B
    whose key, averaged over heads, has the largest cosine with its own. The N − M of A with the largest
    cosines become part of their partners. Ties go to the lower number, NaN counts as the largest. The cosines
    are not stored.

    Args:
        keys: [B, H, N, D], float32, float16, bfloat16 or float64, any strides; H and D at least 1.
        num_out: M, the number of tokens that stay, in [N − floor(N / 2), N].

    Returns:
        kept, int64 [B, M], ascending; and owner, int64 [B, N], the number among those that stay.

    Cosines are computed in float32 (float64 for float64 keys). There is no gradient. Deterministic for any
    number of threads.

    Raises:
        TypeError: the dtype of `keys` is not supported, or `num_out` is not an int.
        ValueError: the shape of `keys` or `num_out` is out of range.
    """
    checks.bipartite_matching(keys, num_out)
    if num_out == keys.shape[2] or not library.runs_kernel(keys):
        return reference.bipartite_matching(keys, num_out)
    return torch.ops.evit.bipartite_matching(keys.detach(), num_out)


@torch.library.register_fake("evit::bipartite_matching")
def _fake(keys: Tensor, num_out: int) -> tuple[Tensor, Tensor]:
    checks.bipartite_matching(keys, num_out)
    return (
        keys.new_empty((keys.shape[0], num_out), dtype=torch.int64),
        keys.new_empty((keys.shape[0], keys.shape[2]), dtype=torch.int64),
    )


@register_flop_formula(torch.ops.evit.bipartite_matching)
def _flops(keys_shape: Any, *arguments: Any, out_shape: Any = None, **named: Any) -> int:
    """Return the floating-point operations of the products of all of A with all of B."""
    batch, _, num_tokens, channels = keys_shape
    return int(2 * batch * ((num_tokens + 1) // 2) * (num_tokens // 2) * channels)
