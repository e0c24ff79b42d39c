"""DynamicViT: a DeiT whose predictors decide which patches go on. The model that EViT is compared with.

Method of Rao et al., "DynamicViT: Efficient Vision Transformers with Dynamic Token Sparsification" (NeurIPS
2021, arXiv 2106.02034). State-dict keys are those of the published checkpoints: timm's, and those of the
predictors, ``score_predictor.<stage>.in_conv.*`` and ``.out_conv.*``.

Notation: B batch, N patches, P prefix tokens, T = P + N tokens, K kept patches, C channels, H heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Attention, Block
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from evit_ext._util.messages import shown
from evit_ext.models.deit_model import DeiT
from evit_ext.models.masked_attention import attention_bias, masked_block
from evit_ext.patching.applying import check_locations
from evit_ext.patching.keep_rates import keep_rates, set_keep_rate
from evit_ext.tokens.dynamicvit import TokenPredictor, sample_decisions
from evit_ext.tokens.trail import TokenTrail


class DynamicViTOutput(NamedTuple):
    """What a :class:`DynamicViT` returns in training.

    Attributes:
        logits: [B, classes].
        tokens: the patches' tokens after the last norm, [B, N, C], dropped ones too.
        mask: 1 for the patches that are left after the last stage, else 0: [B, N], without gradient.
        decisions: for each stage the same, [B, N], with a gradient to its predictor and the earlier ones.
    """

    logits: Tensor
    tokens: Tensor
    mask: Tensor
    decisions: tuple[Tensor, ...]


class DynamicViT(DeiT):
    """A DeiT that drops the patches its predictors rate lowest (Rao et al., NeurIPS 2021).

    Before each block of `drop_loc`, a :class:`TokenPredictor` rates the remaining patches.

    In eval mode, ``int(num_patches * keep_ratio)`` patches (at least 1) with the highest probability of being
    kept remain, in their order, and the others are dropped. The keep ratio of stage i, a share of all patches
    of the image, is ``keep_rate ** (i + 1)``. The forward returns logits [B, classes]. The published code
    orders the kept tokens by score; the output does not depend on it.

    In training mode, the forward returns a :class:`DynamicViTOutput` for
    :class:`evit_ext.training.DynamicViTLoss`. Whether a patch is kept is sampled from its predicted
    probability (straight-through Gumbel-softmax of temperature 1). No token is removed; instead, the other
    tokens cannot attend to dropped ones.

    Args:
        args, kwargs: of timm's VisionTransformer.
        keep_rate: see :attr:`keep_rate`.
        drop_loc: numbers of the blocks before which patches are dropped, ascending, from 0; None for those
            at the quarters of the depth.

    Raises:
        TypeError: a keep rate or block number is not a number.
        ValueError: `keep_rate` or `drop_loc` is out of range, the pooling is not the class token's, patch
            dropout is asked for, or blocks are not timm's ordinary ones.
    """

    #: Beginnings of the state-dict keys that a DeiT does not have.
    ADDED = ("score_predictor.",)

    def __init__(
        self,
        *args: Any,
        keep_rate: float | Sequence[float] = 0.7,
        drop_loc: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if self.global_pool != "token":
            raise ValueError(
                "global_pool must be 'token', as other poolings would see the patches that are dropped in "
                f"training only, got {shown(self.global_pool)}"
            )
        if not isinstance(self.patch_drop, nn.Identity):
            raise ValueError("patch_drop_rate must be 0: the keep ratios are shares of all patches")
        for number, block in enumerate(self.blocks):
            if type(block) is not Block or type(block.attn) is not Attention:
                raise ValueError(
                    f"block {number} is a {type(block).__name__} with a {type(block.attn).__name__}, which "
                    "is not supported: expected timm's Block and Attention"
                )
        self.drop_loc = tuple(check_locations(len(self.blocks), drop_loc))
        like = next(self.parameters())
        self.score_predictor = nn.ModuleList(
            TokenPredictor(self.embed_dim, stage, like.device, like.dtype)
            for stage in range(len(self.drop_loc))
        )
        self.keep_rate = keep_rate
        if kwargs.get("weight_init") != "skip":
            for predictor in self.stages():
                predictor.init_weights()

    @property
    def keep_rate(self) -> float | tuple[float, ...]:
        """Share of the patches that a stage keeps of those that enter it, in (0, 1].

        One number, or one for each stage. Can be set; under ``torch.compile`` each value compiles again.
        """
        rates = keep_rates(self)
        return rates[0] if len(rates) == 1 else tuple(rates)

    @keep_rate.setter
    def keep_rate(self, keep_rate: float | Sequence[float]) -> None:
        set_keep_rate(self, keep_rate)

    @property
    def keep_ratios(self) -> tuple[float, ...]:
        """Share of all patches that is left after each stage."""
        return tuple(predictor.rule.keep_ratio for predictor in self.stages())

    def stages(self) -> list[TokenPredictor]:
        """Return the predictors, in order."""
        return [predictor for predictor in self.score_predictor if isinstance(predictor, TokenPredictor)]

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Any:
        """Return the logits [B, classes] of images [B, channels, height, width], in training more.

        Raises:
            NotImplementedError: `attn_mask` or `is_causal` is given.
        """
        if not self.training:
            return self.forward_head(self.forward_features(x, attn_mask, is_causal))
        _refuse_masks(attn_mask, is_causal)
        features, decisions = self._masked_features(x)
        return DynamicViTOutput(
            self.forward_head(features),
            features[:, self.num_prefix_tokens :],
            decisions[-1].detach(),
            decisions,
        )

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Return the normalised tokens: [B, P + K, C], of the K patches that are left; in training [B, T, C].

        Raises:
            NotImplementedError: `attn_mask` or `is_causal` is given.
        """
        _refuse_masks(attn_mask, is_causal)
        if self.training:
            return self._masked_features(x)[0]
        x = self._embed(x)
        trail = TokenTrail()
        for number, block in enumerate(self.blocks):
            if number in self.drop_loc:
                predictor = self.stages()[self.drop_loc.index(number)]
                x = predictor.reduce(x, trail, self.num_prefix_tokens)
            x = self._run(block, x)
        return self.norm(x)

    def forward_intermediates(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not supported: there is no token for every patch."""
        raise NotImplementedError(
            "a DynamicViT gives no intermediate features: after its first stage there is no token for every "
            "patch; evit_ext.record_tokens tells which are left"
        )

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return timm's groups of parameters; predictors go with the head, not with their blocks."""
        groups = super().group_matcher(coarse)
        return {**groups, "blocks": [*groups["blocks"], (r"^score_predictor", (99999,))]}

    def _embed(self, x: Tensor) -> Tensor:
        """Return the tokens [B, T, C] that enter the first block."""
        return self.norm_pre(self._pos_embed(self.patch_embed(x)))

    def _run(self, function: Any, *args: Any) -> Any:
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(function, *args, use_reentrant=False)
        return function(*args)

    def _masked_features(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the normalised tokens [B, T, C] of images and the decisions [B, N] of each stage."""
        x = self._embed(x)
        prefix = self.num_prefix_tokens
        left: Tensor | None = None
        bias: Tensor | None = None
        decisions: list[Tensor] = []
        for number, block in enumerate(self.blocks):
            if number in self.drop_loc:
                predictor = self.stages()[self.drop_loc.index(number)]
                decided = sample_decisions(predictor(x[:, prefix:], left))
                # Dropped once is dropped for good.
                left = decided if left is None else decided * left
                decisions.append(left)
                bias = attention_bias(F.pad(left, (prefix, 0), value=1.0))
            x = self._run(block, x) if bias is None else self._run(masked_block, block, x, bias)
        return self.norm(x), tuple(decisions)


def _refuse_masks(attn_mask: Tensor | None, is_causal: bool) -> None:
    if attn_mask is not None or is_causal:
        raise NotImplementedError("a DynamicViT takes no attn_mask and no is_causal")
