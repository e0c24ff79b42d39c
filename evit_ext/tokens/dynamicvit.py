"""DynamicViT's predictors, which say what patches are worth, and how a decision is made of it in training.

Method of Rao et al., "DynamicViT: Efficient Vision Transformers with Dynamic Token Sparsification" (NeurIPS
2021, arXiv 2106.02034).

Notation: B batch, N patches, C channels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from evit_ext.ops import checks

if TYPE_CHECKING:
    from evit_ext.patching.recording import TokenRecord


class TokenPredictor(nn.Module):
    """Predicts for each patch whether it shall be kept, from itself and the mean of those that are left.

    The published ``PredictorLG`` (Rao et al., 2021, section 3.2): half of the channels stay local, the other
    half is averaged over the patches that are left.

    Args:
        dim: C.
        device, dtype: of the parameters.
    """

    def __init__(
        self, dim: int, device: torch.device | None = None, dtype: torch.dtype | None = None
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
        #: The records that are being taken, each with the stage that this predictor is in it.
        self.recorders: tuple[tuple[TokenRecord, int], ...] = ()

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

    def __getstate__(self) -> dict[str, Any]:
        # A copy or a saved model has no record being taken.
        return {**self.__dict__, "recorders": ()}


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
