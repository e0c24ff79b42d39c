"""The loss of token labelling: a label for every patch that is left."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evit_ext.models.lvvit import TokenLabelOutput
from evit_ext.training.objectives.objective import Objective, ObjectiveOutput


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


class TokenLabelTraining(Objective):
    """Token labelling of an :class:`evit_ext.models.lvvit.LVViT` with an auxiliary head, in training mode.

    Labels are smoothed as in the published training (github.com/zihangJiang/TokenLabeling): those of images,
    where they are class numbers, and those of patches, to ``(1 - s) * label + s / classes``. (Of patches the
    published code has 1 - s + s / classes in the place of 1 - s, with which they do not add up to 1.) The
    class token learns the image's label, as in the paper; the published code has the mean label of the crop
    in its place.

    Args:
        loss: on what the model returns.
        label_smoothing: s, in [0, 1); as published 0.1.

    Raises:
        ValueError: `label_smoothing` is out of range.
    """

    def __init__(self, loss: TokenLabelLoss, label_smoothing: float = 0.0) -> None:
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}")
        self.loss = loss
        self.label_smoothing = label_smoothing

    def __call__(
        self, model: nn.Module, images: Tensor, targets: Tensor, token_labels: Tensor | None = None
    ) -> ObjectiveOutput:
        output = model(images)
        if targets.dim() == 1 and hasattr(output, "aux_logits"):  # the loss refuses any other output
            targets = self._smoothed(F.one_hot(targets, output.logits.shape[1]))
        if token_labels is not None:
            token_labels = self._smoothed(token_labels)
        return ObjectiveOutput(self.loss(output, targets, token_labels).float(), output.logits)

    def _smoothed(self, labels: Tensor) -> Tensor:
        return (1 - self.label_smoothing) * labels.float() + self.label_smoothing / labels.shape[-1]


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return -Σ labels · log softmax(logits) over the last dimension."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return -(labels * logits.log_softmax(dim=-1, dtype=dtype)).sum(dim=-1)
