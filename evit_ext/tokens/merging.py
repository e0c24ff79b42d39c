"""Plans that merge tokens into others, by weighted averages.

Notation: B batch, N tokens, P prefix tokens, M patch tokens that leave, C channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from evit_ext import ops
from evit_ext.ops import checks
from evit_ext.tokens.plan import Plan


class MergePlan(Plan):
    """Merges patch tokens into others, each of which stays where it is.

    Args:
        kept: int64 [B, M], the tokens that stay, ascending.
        owner: int64 [B, N − P], the number of the token that each becomes part of, among those that leave.
        sizes: of how many patches each token is made, [B, N − P]; None if each is one.
        weights: of each token in the average, [B, N − P], which need not sum to 1; by default the sizes.
        scores: [B, N − P], what the kept ones were chosen by; None if by none.
    """

    def __init__(
        self,
        kept: Tensor,
        owner: Tensor,
        sizes: Tensor | None,
        weights: Tensor | None = None,
        scores: Tensor | None = None,
    ) -> None:
        super().__init__(kept, owner.shape[1], owner=owner, scores=scores, complete=True)
        self._sizes = sizes
        self._weights = weights
        self._totals: Tensor | None = None

    def merged_sizes(self, sizes: Tensor | None, dtype: torch.dtype, device: torch.device) -> Tensor:
        """See `Plan.merged_sizes`; those that :meth:`apply` summed, where it did."""
        if self._totals is not None and sizes is self._sizes and self._totals.dtype == dtype:
            return self._totals
        return super().merged_sizes(sizes, dtype, device)

    def apply(self, x: Tensor, num_prefix_tokens: int) -> Tensor:
        """Return the tokens that leave, [B, P + M, C]: weighted averages."""
        weights = self._sizes if self._weights is None else self._weights
        merged, totals = ops.merge_tokens(x, self.owner, self.num_out, weights, num_prefix_tokens)
        if self._weights is None:
            self._totals = totals.detach()  # sizes are numbers, of which `x` changes nothing
        return merged

    def settled(self) -> Plan:
        """See `Plan.settled`."""
        return Plan(self.kept, self.num_patches, owner=self.owner, scores=self.scores, complete=True)


def squeezed(tokens: Tensor, kept: Tensor, scores: Tensor | None = None) -> MergePlan:
    """Return the plan that squeezes each token which is not kept into the most similar one that is.

    Wei et al., "Joint Token Pruning and Squeezing Towards More Aggressive Compression of Vision Transformers"
    (CVPR 2023, arXiv 2304.10716): similarity is the cosine of the tokens, and a token that stays becomes the
    average of itself and those squeezed into it, weighted by the exponentials of their similarities to it,
    its own being 1. The choice has no gradient; weights and average have.

    Args:
        tokens: the patch tokens, [B, N, C].
        kept: int64 [B, K], ascending, K at least 1.
        scores: what they were chosen by, [B, N].
    """
    batch, num_tokens, _ = tokens.shape
    every = torch.arange(num_tokens, device=tokens.device)
    is_kept = (kept.unsqueeze(1) == every.view(1, -1, 1)).any(dim=2)
    with checks.without_autocast(tokens.device.type):
        wide = tokens.to(checks.accumulation_dtype(tokens.dtype))
        unit = F.normalize(wide, dim=2)
        similarity = unit @ ops.gather_tokens(unit, kept).transpose(1, 2)
    best, host = similarity.max(dim=2)
    places = is_kept.to(torch.int64).cumsum(dim=1) - 1
    owner = torch.where(is_kept, places, host)
    weights = torch.where(is_kept, 1.0, best).exp()
    return MergePlan(kept, owner.expand(batch, -1), None, weights, scores)
