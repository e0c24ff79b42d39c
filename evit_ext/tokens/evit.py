"""EViT's rule: keep the patches that the class token attends to most, fuse the others into one token.

Liang et al., "Not All Patches are What You Need: Expediting Vision Transformers via Token Reorganizations"
(ICLR 2022, arXiv 2202.07800), section 3.2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from evit_ext import ops
from evit_ext._util.messages import shown
from evit_ext.tokens.merging import squeezed
from evit_ext.tokens.plan import Plan
from evit_ext.tokens.rule import KeepRateRule, Seen

#: Where the patch tokens that are not kept may go.
FUSIONS = ("sum", "normalized", "squeezed")


class BestPlan(Plan):
    """Keeps the patch tokens with the highest scores, ties to the lower index, and may fuse the others.

    The selection is part of the operators that move the tokens, so it is made when the first of them runs.

    Args:
        seen: what the rule sees, with scores.
        num_keep: K.
        fuse: append the others' sum, weighted by their scores.
        normalized: divide that sum by the sum of these scores.
    """

    def __init__(self, seen: Seen, num_keep: int, fuse: bool, normalized: bool = False) -> None:
        self._seen = seen
        self._token_scores = seen.token_scores
        if normalized and num_keep < seen.num_patches:
            # The order stays; the sum of the lowest is the same whichever of equal ones are among them.
            others = seen.scores.topk(seen.num_patches - num_keep, dim=1, largest=False, sorted=False).values
            least = torch.finfo(others.dtype).tiny
            total = others.sum(dim=1, keepdim=True).clamp(min=least)
            self._token_scores = None if seen.token_scores is None else seen.token_scores / total
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


@dataclass(frozen=True, repr=False)
class EViT(KeepRateRule, name="evit"):
    """Keep the patches that receive the most attention of the class token, fuse the others into one token.

    In models without a class token, patches are ranked by the mean attention of all tokens.

    Args:
        keep_rate: share of the patch tokens to keep, in (0, 1]: ``K = ceil(keep_rate * (N − P))``. With
            K = N − P nothing happens.
        fuse_token: append ``Σ scores[j] · x[j]`` over the patch tokens that are not kept, not divided by the
            sum of their scores; False drops them.
        fusion: where they go, if not dropped: "sum", as above and in the paper; "normalized", the same
            divided by the sum of their scores, which is their weighted average; or "squeezed": no token is
            appended, and each becomes part of the most similar kept one, see
            :func:`evit_ext.tokens.merging.squeezed` (Wei et al., CVPR 2023).
        proportional: the attention of the blocks that follow adds the logarithm of the number of patches that
            a token stands for to its logits, as :class:`evit_ext.tokens.ToMe` does; in the paper, a fused
            token weighs as much as a patch. Not for ``fuse_token=False``, where each token stands for one.
    """

    keep_rate: float = 0.7
    fuse_token: bool = True
    fusion: str = "sum"
    proportional: bool = False

    paper = "https://arxiv.org/abs/2202.07800"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.fuse_token, bool):
            raise TypeError(f"fuse_token must be True or False, got {shown(self.fuse_token)}")
        if self.fusion not in FUSIONS:
            raise ValueError(
                f"fusion must be one of {', '.join(map(repr, FUSIONS))}, got {shown(self.fusion)}"
            )
        if self.fusion != "sum" and not self.fuse_token:
            raise ValueError(f"fusion {self.fusion!r} fuses tokens, and fuse_token=False drops them")
        if not isinstance(self.proportional, bool):
            raise TypeError(f"proportional must be True or False, got {shown(self.proportional)}")
        if self.proportional and not self.fuse_token:
            raise ValueError(
                "proportional=True weighs tokens by the patches they stand for, and with fuse_token=False "
                "each stands for one: leave one of them out"
            )

    def __repr__(self) -> str:
        """Return what builds it; fusion and proportional only where they are not the paper's."""
        return f"EViT({', '.join(f'{name}={value!r}' for name, value in self.settings().items())})"

    def settings(self) -> dict[str, Any]:
        """See `Rule.settings`; files of models by the paper's rule are as before there was another."""
        others = {"fusion": self.fusion, "proportional": self.proportional}
        other = {name: value for name, value in others.items() if value not in ("sum", False)}
        return {"keep_rate": self.keep_rate, "fuse_token": self.fuse_token, **other}

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
        return frozenset({"scores", "sizes"} if self.proportional else {"scores"})

    def num_kept(self, num_patches: int, num_image_patches: int | None) -> int:
        """See `Rule.num_kept`."""
        return math.ceil(self.keep_rate * num_patches)

    def num_out(self, num_patches: int, num_image_patches: int | None) -> int:
        """See `Rule.num_out`."""
        num_kept = self.num_kept(num_patches, num_image_patches)
        makes_one = self.fuse_token and self.fusion != "squeezed" and num_kept < num_patches
        return num_kept + int(makes_one)

    def plan(self, seen: Seen) -> Plan:
        """See `Rule.plan`."""
        num_kept = self.num_kept(seen.num_patches, seen.num_image_patches)
        if self.fusion == "squeezed" and num_kept < seen.num_patches:
            kept = BestPlan(seen, num_kept, fuse=False).kept
            return squeezed(seen.tokens[:, seen.num_prefix_tokens :], kept, seen.scores)
        return BestPlan(seen, num_kept, self.fuse_token, self.fusion == "normalized")

    def describe(self) -> str:
        """See `Rule.describe`."""
        if self.fusion == "squeezed":
            return "squeezed into the most similar kept ones"
        return "fused into one token" if self.fuse_token else "dropped"
