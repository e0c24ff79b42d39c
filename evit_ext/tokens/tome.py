"""ToMe's rule: tokens with similar keys are merged into their weighted average.

Bolya et al., "Token Merging: Your ViT But Faster" (ICLR 2023, arXiv 2210.09461), sections 3.1 and 3.2;
written from the paper alone.

Notation: N tokens, P prefix tokens, M patch tokens that leave.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, replace
from typing import Any

from evit_ext import ops
from evit_ext._util.messages import shown
from evit_ext.tokens.merging import MergePlan
from evit_ext.tokens.plan import Plan
from evit_ext.tokens.rule import KeepRateRule, Seen


@dataclass(frozen=True)
class ToMe(KeepRateRule, name="tome"):
    """Merge the patch tokens whose keys are most similar, a fixed number of them; drop nothing.

    Patch tokens are dealt alternately to two sets, A (the first, the third, …) and B. Each of A has as its
    partner the token of B whose key, averaged over heads, has the largest cosine similarity to its own. The
    `r` tokens of A with the most similar partners become part of these, which turn into averages of all that
    they stand for, weighted by the numbers of patches ("bipartite soft matching"). Ties go to the lower
    index. Class, distillation and register tokens are never merged. The matching has no gradient, the average
    has.

    The paper merges in every block: ``evit_ext.apply(vit, rule=ToMe(r=13), drop_loc=range(12))``.

    Args:
        keep_rate: share of the patch tokens that leave, in [0.5, 1]: ``M = ceil(keep_rate * (N − P))``; 0.7
            if `r` is not given either.
        r: instead, how many patch tokens a block merges away; where less than twice as many are there, half
            of these. 0 is a `keep_rate` of 1.
        proportional: the attention of the blocks that follow adds the logarithm of each token's size to its
            logits ("proportional attention"), as if each token were there as often as it has patches.
    """

    keep_rate: float = None  # type: ignore[assignment]
    r: int | None = None
    proportional: bool = True

    paper = "https://arxiv.org/abs/2210.09461"
    fuses = True

    def __post_init__(self) -> None:
        if not isinstance(self.proportional, bool):
            raise TypeError(f"proportional must be True or False, got {shown(self.proportional)}")
        if self.r is None:
            object.__setattr__(self, "keep_rate", 0.7 if self.keep_rate is None else self.keep_rate)
            super().__post_init__()
            if self.keep_rate < 0.5:
                raise ValueError(
                    "keep_rate of ToMe must be in [0.5, 1], as a block merges at most half of the tokens, "
                    f"got {self.keep_rate}: let more blocks merge (drop_loc)"
                )
            return
        if self.keep_rate is not None:
            raise ValueError(
                "ToMe takes a keep_rate or r, the number of tokens to merge away, got both: "
                f"keep_rate={shown(self.keep_rate)}, r={shown(self.r)}"
            )
        if isinstance(self.r, bool) or not hasattr(self.r, "__index__"):
            raise TypeError(f"r must be a whole number of tokens, got {shown(self.r)}")
        object.__setattr__(self, "r", operator.index(self.r))
        if self.r < 0:
            raise ValueError(f"r must not be negative, got {self.r}")
        if self.r == 0:  # by which others see that nothing is reduced
            object.__setattr__(self, "keep_rate", 1.0)
            object.__setattr__(self, "r", None)

    def with_keep_rate(self, keep_rate: float) -> ToMe:
        """Return the same rule with a keep rate, in the place of `r` too."""
        return replace(self, keep_rate=keep_rate, r=None)

    @property
    def title(self) -> str:
        """See :class:`Rule`."""
        return "ToMe"

    @property
    def score_meaning(self) -> str | None:
        """See :class:`Rule`."""
        return "none; tokens are merged by the similarity of their keys"

    def wants(self) -> frozenset[str]:
        """See `Rule.wants`."""
        return frozenset({"keys", "sizes"})

    def num_out(self, num_patches: int, num_image_patches: int | None) -> int:
        """See `Rule.num_out`."""
        if self.r is None:
            return math.ceil(self.keep_rate * num_patches)
        return num_patches - min(self.r, num_patches // 2)

    def plan(self, seen: Seen) -> Plan:
        """See `Rule.plan`."""
        num_out = self.num_out(seen.num_patches, seen.num_image_patches)
        assert seen.keys is not None
        kept, owner = ops.bipartite_matching(seen.keys[:, :, seen.num_prefix_tokens :], num_out)
        return MergePlan(kept, owner, seen.sizes)

    def settings(self) -> dict[str, Any]:
        """See `Rule.settings`."""
        given = {"keep_rate": self.keep_rate} if self.r is None else {"r": self.r}
        return {**given, "proportional": self.proportional}

    def describe(self) -> str:
        """See `Rule.describe`."""
        return "merged into the most similar of the others"
