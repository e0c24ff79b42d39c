"""The loss of token labelling: a label for every patch that is left."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evit_ext.models.lvvit import TokenLabelOutput


class TokenLabelLoss(nn.Module):
    """Cross-entropy of the class token's logits plus, weighted, that of the remaining patches' logits.

    The loss of Jiang et al., "All Tokens Matter" (NeurIPS 2021), on what an EViT-LV-ViT returns in training.
    Only patches that were kept to the end are supervised; fused tokens are not. Labels are mixed as MixToken
    mixed the patches. At keep rate 1 this is the published loss.

    Args:
        dense_weight: weight of the patches' loss; published are 0.5, and 0 for fine-tuning without token
            labels.
        cls_weight: weight of the class token's.

    Raises:
        ValueError: a weight is negative, or both are 0.
    """

    def __init__(self, dense_weight: float = 0.5, cls_weight: float = 1.0) -> None:
        super().__init__()
        if not (dense_weight >= 0 and cls_weight >= 0 and dense_weight + cls_weight > 0):
            raise ValueError(
                "dense_weight and cls_weight must not be negative and not both 0, got "
                f"{dense_weight} and {cls_weight}"
            )
        self.dense_weight = dense_weight
        self.cls_weight = cls_weight

    def forward(self, output: TokenLabelOutput, labels: Tensor, token_labels: Tensor | None = None) -> Tensor:
        """Return the loss, a mean over the images and over the patches that are left.

        Args:
            output: what the model returned for B images.
            labels: of the images: int64 [B], or probabilities [B, classes], float.
            token_labels: probabilities [B, patches, classes], float, of all patches of the images before
                MixToken, row by row; None gives every patch the label of its image.

        Returns:
            A scalar, float32 (float64 for float64 logits).

        Raises:
            TypeError: `output` is not what an LV-ViT with an auxiliary head returns in training.
            ValueError: labels have another shape.
        """
        if not isinstance(output, TokenLabelOutput):
            raise TypeError(
                "output must be the TokenLabelOutput of an LV-ViT with return_dense=True in training mode, "
                f"got {type(output).__name__}"
            )
        logits, aux_logits, patches, images, own_share = output
        if labels.dim() == 1:
            labels = F.one_hot(labels, logits.shape[1])
        if labels.shape != logits.shape:
            raise ValueError(
                f"labels must be [{len(logits)}] or {list(logits.shape)}, got {list(labels.shape)}"
            )
        mixed = own_share * labels + (1 - own_share) * labels.flip(0)
        loss = self.cls_weight * _cross_entropy(logits, mixed).mean()
        if self.dense_weight == 0:
            # The auxiliary head takes part with a gradient of zero: DistributedDataParallel waits for it.
            return loss + 0 * aux_logits.sum()
        if token_labels is None:
            wanted = labels[images]
        else:
            if token_labels.dim() != 3 or token_labels.shape[::2] != labels.shape:
                raise ValueError(
                    f"token_labels must be [{len(logits)}, patches, {logits.shape[1]}], got "
                    f"{list(token_labels.shape)}"
                )
            wanted = token_labels[images, patches]
        supervised = patches >= 0
        losses = _cross_entropy(aux_logits, wanted).where(supervised, 0)
        return loss + self.dense_weight * losses.sum() / supervised.sum().clamp(min=1)


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return -Σ labels · log softmax(logits) over the last dimension."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return -(labels * logits.log_softmax(dim=-1, dtype=dtype)).sum(dim=-1)
