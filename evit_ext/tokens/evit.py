"""EViT's rule: keep the patches that the class token attends to most, fuse the others into one token.

Liang et al., "Not All Patches are What You Need: Expediting Vision Transformers via Token Reorganizations"
(ICLR 2022, arXiv 2202.07800), section 3.2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor, nn

from evit_ext import ops
from evit_ext._util.messages import shown
from evit_ext.tokens.plan import Plan
from evit_ext.tokens.rule import KeepRateRule, Seen


class BestPlan(Plan):
    """Keeps the patch tokens with the highest scores, ties to the lower index, and may fuse the others.

    The selection is part of the operators that move the tokens, so it is made when the first of them runs.

    Args:
        seen: what the rule sees, with scores.
        num_keep: K.
        fuse: append the others' sum, weighted by their scores.
    """

    def __init__(self, seen: Seen, num_keep: int, fuse: bool) -> None:
        self._seen = seen
        self._token_scores = seen.token_scores
        self._fuse = fuse
        self._kept: Tensor | None = None
        self.num_keep = num_keep
        self.num_patches = seen.num_patches
        self.num_made = int(fuse and num_keep < seen.num_patches)
        self.complete = False
        self._given_owner = None

    @property
    def kept(self) -> Tensor:  # type: ignore[override]
        """See :class:`Plan`."""
        if self._kept is None:
            self.apply(self._seen.tokens, self._seen.num_prefix_tokens)
            assert self._kept is not None
        return self._kept

    @property
    def scores(self) -> Tensor:  # type: ignore[override]
        """See :class:`Plan`."""
        return self._seen.scores

    @property
    def keeps_all(self) -> bool:
        """See :class:`Plan`."""
        return self.num_keep == self.num_patches

    @property
    def num_kept(self) -> int:
        """See :class:`Plan`."""
        return self.num_keep

    def apply(self, x: Tensor, num_prefix_tokens: int) -> Tensor:
        """Return the prefix tokens, the kept ones and the fused one, [B, P + K (+ 1), C]."""
        assert self._token_scores is not None
        tokens, self._kept = ops.reorganize_tokens(
            x, self._token_scores, self.num_keep, num_prefix_tokens, self._fuse
        )
        return tokens

    def add_apply_norm(
        self, x: Tensor, branch: Tensor, num_prefix_tokens: int, norm: nn.LayerNorm
    ) -> tuple[Tensor, Tensor] | None:
        """See `Plan.add_apply_norm`."""
        if self.keeps_all:
            return None
        assert self._token_scores is not None
        tokens, normed, self._kept = ops.add_reorganize_norm(
            x,
            branch,
            self._token_scores,
            self.num_keep,
            norm.weight,
            norm.bias,
            norm.eps,
            num_prefix_tokens,
            self._fuse,
        )
        return tokens, normed

    def settled(self) -> Plan:
        """See `Plan.settled`."""
        return Plan(self.kept, self.num_patches, self.num_made, scores=self.scores)


@dataclass(frozen=True)
class EViT(KeepRateRule, name="evit"):
    """Keep the patches that receive the most attention of the class token, fuse the others into one token.

    In models without a class token, patches are ranked by the mean attention of all tokens.

    Args:
        keep_rate: share of the patch tokens to keep, in (0, 1]: ``K = ceil(keep_rate * (N − P))``. With
            K = N − P nothing happens.
        fuse_token: append ``Σ scores[j] · x[j]`` over the patch tokens that are not kept, not divided by the
            sum of their scores; False drops them.
    """

    keep_rate: float = 0.7
    fuse_token: bool = True

    paper = "https://arxiv.org/abs/2202.07800"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.fuse_token, bool):
            raise TypeError(f"fuse_token must be True or False, got {shown(self.fuse_token)}")

    @property
    def fuses(self) -> bool:  # type: ignore[override]
        """See :class:`Rule`."""
        return self.fuse_token

    @property
    def title(self) -> str:
        """See :class:`Rule`."""
        return "EViT"

    def wants(self) -> frozenset[str]:
        """See `Rule.wants`."""
        return frozenset({"scores"})

    def num_kept(self, num_patches: int, num_image_patches: int | None) -> int:
        """See `Rule.num_kept`."""
        return math.ceil(self.keep_rate * num_patches)

    def num_out(self, num_patches: int, num_image_patches: int | None) -> int:
        """See `Rule.num_out`."""
        num_kept = self.num_kept(num_patches, num_image_patches)
        return num_kept + (1 if self.fuse_token and num_kept < num_patches else 0)

    def plan(self, seen: Seen) -> Plan:
        """See `Rule.plan`."""
        num_kept = self.num_kept(seen.num_patches, seen.num_image_patches)
        return BestPlan(seen, num_kept, self.fuse_token)

    def describe(self) -> str:
        """See `Rule.describe`."""
        return "fused into one token" if self.fuse_token else "dropped"
