"""DynamicViT's rule: predictors say what patches are worth, and of these a fixed number goes on.

Method of Rao et al., "DynamicViT: Efficient Vision Transformers with Dynamic Token Sparsification" (NeurIPS
2021, arXiv 2106.02034).

Notation: B batch, N patches, C channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from evit_ext.ops import checks
from evit_ext.tokens.evit import BestPlan
from evit_ext.tokens.plan import Plan
from evit_ext.tokens.rule import KeepRateRule, Seen
from evit_ext.tokens.stage import Stage
from evit_ext.tokens.trail import TokenTrail


@dataclass(frozen=True)
class PredictedSelection(KeepRateRule, name="dynamicvit"):
    """Keep the patches that a predictor rates highest, a share of all patches of the image; drop the others.

    For models such as :func:`evit_ext.models.dynamicvit_small`, which have the predictors.

    Args:
        keep_rate: share of the patches that a stage keeps of those that enter it, in (0, 1].
        keep_ratio: share of the image's patches that is left after the stage, the product of the keep rates
            up to it; ``max(1, int(keep_ratio * patches))`` are kept, as published.
    """

    keep_rate: float = 0.7
    keep_ratio: float = 0.7

    paper = "https://arxiv.org/abs/2106.02034"
    has_schedule = False

    def wants(self) -> frozenset[str]:
        """See `Rule.wants`."""
        return frozenset({"predictions"})

    def num_out(self, num_patches: int, num_image_patches: int | None) -> int:
        """See `Rule.num_out`."""
        assert num_image_patches is not None
        return max(1, int(num_image_patches * self.keep_ratio))

    def plan(self, seen: Seen) -> Plan:
        """See `Rule.plan`."""
        return BestPlan(seen, self.num_out(seen.num_patches, seen.num_image_patches), fuse=False)

    def in_turn(self, rules: list[PredictedSelection]) -> list[PredictedSelection]:
        """Return the rules with the shares of all patches that follow from the keep rates, stage by stage."""
        rates = [rule.keep_rate for rule in rules]
        if len(set(rates)) == 1:
            # A power, not a product, as published: the last bit may decide how many patches are kept.
            ratios = [rates[0] ** (stage + 1) for stage in range(len(rates))]
        else:
            ratios = [math.prod(rates[: stage + 1]) for stage in range(len(rates))]
        return [replace(rule, keep_ratio=ratio) for rule, ratio in zip(rules, ratios, strict=True)]

    def settings(self) -> dict[str, Any]:
        """See `Rule.settings`."""
        return {"keep_rate": self.keep_rate}

    @property
    def score_meaning(self) -> str | None:
        """See :class:`Rule`."""
        return "probability of being kept, as the predictor says"

    def shown_scores(self, scores: Tensor) -> Tensor:
        """See `Rule.shown_scores`: probabilities, of which the scores are the logarithms."""
        return scores.exp()

    @property
    def title(self) -> str:
        """See :class:`Rule`."""
        return "DynamicViT"


class TokenPredictor(Stage):
    """Predicts for each patch whether it shall be kept, from itself and the mean of those that are left.

    The published ``PredictorLG`` (Rao et al., 2021, section 3.2): half of the channels stay local, the other
    half is averaged over the patches that are left.

    Args:
        dim: C.
        stage: number of the predictors before it.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        dim: int,
        stage: int = 0,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_conv = nn.Sequential(nn.LayerNorm(dim, **options), nn.Linear(dim, dim, **options), nn.GELU())
        self.out_conv = nn.Sequential(
            nn.Linear(dim, dim // 2, **options),
            nn.GELU(),
            nn.Linear(dim // 2, dim // 4, **options),
            nn.GELU(),
            nn.Linear(dim // 4, 2, **options),
            nn.LogSoftmax(dim=-1),
        )
        self.rule: PredictedSelection = PredictedSelection()
        self.stage = stage
        self.recorders = ()
        self.guidance = None

    def reduce(self, x: Tensor, trail: TokenTrail, num_prefix_tokens: int) -> Tensor:
        """Return the tokens [B, P + K, C] that this stage leaves of `x` [B, N, C]; `trail` receives it."""
        scores = self(x[:, num_prefix_tokens:])[:, :, 0]
        num_patches = x.shape[1] - num_prefix_tokens
        num_image_patches = trail.num_image_patches(num_patches)
        seen = Seen(x, None, num_prefix_tokens, num_patches, num_image_patches, scores)
        plan = self.rule.plan(seen)
        out = plan.apply(x, num_prefix_tokens)
        self.report(plan, trail, x)
        return out

    def init_weights(self) -> None:
        """Initialise as the published code does: Linear weights from a normal with deviation 0.02."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor, left: Tensor | None = None) -> Tensor:
        """Return the log-probabilities to keep and to drop each patch.

        Args:
            x: the patches' tokens [B, N, C].
            left: 1 for the patches that are left, else 0: [B, N]; None for all. Where none is left the mean
                is 0 (published: NaN).

        Returns:
            [B, N, 2], first to keep, then to drop.
        """
        local, shared = self.in_conv(x).tensor_split((x.shape[2] // 2,), dim=2)
        if left is None:
            mean = shared.mean(dim=1, keepdim=True)
        else:
            left = left.to(shared.dtype).unsqueeze(2)
            mean = (shared * left).sum(dim=1, keepdim=True) / left.sum(dim=1, keepdim=True).clamp(min=1)
        return self.out_conv(torch.cat([local, mean.expand_as(shared)], dim=2))


def sample_decisions(log_probabilities: Tensor) -> Tensor:
    """Decide at random for each patch whether it is kept, with a gradient to the probabilities.

    Gumbel-softmax of temperature 1 (Jang et al., ICLR 2017), rounded; the gradient is that of what was
    rounded ("straight through").

    Args:
        log_probabilities: [B, N, 2], to keep and to drop.

    Returns:
        [B, N], exactly 1 (keep) or 0, float32 (float64 for float64).
    """
    log_probabilities = log_probabilities.to(checks.accumulation_dtype(log_probabilities.dtype))
    perturbed = log_probabilities + gumbel_noise(log_probabilities)
    keep, drop = perturbed.unbind(2)
    soft = (keep - drop).sigmoid()  # the softmax of two
    # The difference is 0, and exactly so, which (hard - soft) + soft is not.
    return (keep >= drop).to(soft.dtype) + (soft - soft.detach())


def gumbel_noise(like: Tensor) -> Tensor:
    """Return samples of the Gumbel distribution, of torch's generator, in the shape and dtype of `like`."""
    return -torch.empty_like(like, requires_grad=False).exponential_().log()
