"""Keeping patches at random: the control of every study of token reduction."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from evit_ext.tokens.evit import BestPlan
from evit_ext.tokens.plan import Plan
from evit_ext.tokens.rule import KeepRateRule, Seen


@dataclass(frozen=True)
class RandomSelection(KeepRateRule, name="random"):
    """Keep patches drawn at random, each as likely as any other, and drop the others.

    They are drawn anew for every image in every forward, in training and in eval mode, by torch's generator
    of the tokens' device.

    Args:
        keep_rate: share of the patch tokens to keep, in (0, 1]: ``K = ceil(keep_rate * (N − P))``.
    """

    keep_rate: float = 0.7

    draws = True

    def num_out(self, num_patches: int, num_image_patches: int | None) -> int:
        """See `Rule.num_out`."""
        return math.ceil(self.keep_rate * num_patches)

    def plan(self, seen: Seen) -> Plan:
        """See `Rule.plan`."""
        drawn = torch.rand(seen.batch, seen.num_patches, device=seen.device)
        return BestPlan(
            seen.with_scores(drawn), self.num_out(seen.num_patches, seen.num_image_patches), False
        )

    @property
    def score_meaning(self) -> str | None:
        """See :class:`Rule`."""
        return "random numbers"
