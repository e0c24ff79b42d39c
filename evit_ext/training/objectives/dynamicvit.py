"""The losses that a DynamicViT is trained with: classification, keep ratio, and what a teacher says.

Rao et al., "DynamicViT" (NeurIPS 2021), section 3.3, with the published code's weights for DeiT.
Notation: B batch, N patches, P prefix tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evit_ext._util.messages import shown
from evit_ext.models.dynamicvit import DynamicViTOutput
from evit_ext.training.objectives.objective import Objective, ObjectiveOutput, refuse_token_labels


class LossParts(NamedTuple):
    """`total` is the weighted sum of the others, which are not weighted; scalars."""

    total: Tensor
    classification: Tensor
    ratio: Tensor
    logits: Tensor
    tokens: Tensor


class DynamicViTLoss(nn.Module):
    """Classification loss + ratio loss + distillation of the logits and of the remaining tokens.

    ``total = classification + ratio_weight * ratio + distill_weight * (logits + tokens)``, see
    :func:`ratio_loss`, :func:`logits_loss` and :func:`token_loss`.

    Args:
        keep_ratios: share of the patches that should remain after each stage: the model's ``keep_ratios``.
        teacher: the dense model, a timm VisionTransformer with a token for every patch, such as the DeiT that
            the DynamicViT started from; on the images' device. It is kept in eval mode and gets no gradient.
            None omits both distillation losses.
        classification: of logits and targets; by default the cross-entropy, for class numbers and for the
            soft targets of mixup.
        ratio_weight: weight of the ratio loss, as published 2.
        distill_weight: weight of both distillation losses, as published 0.5.
        token_distance: "mse" as published for DeiT, or "kl".

    Raises:
        ValueError: `token_distance` is neither, or there is no keep ratio.
    """

    def __init__(
        self,
        keep_ratios: Sequence[float],
        teacher: nn.Module | None = None,
        classification: nn.Module | None = None,
        ratio_weight: float = 2.0,
        distill_weight: float = 0.5,
        token_distance: Literal["mse", "kl"] = "mse",
    ) -> None:
        super().__init__()
        if token_distance not in ("mse", "kl"):
            raise ValueError(f"token_distance must be 'mse' or 'kl', got {shown(token_distance)}")
        if not keep_ratios:
            raise ValueError("keep_ratios must have a number for each stage, got none")
        self.keep_ratios = tuple(keep_ratios)
        self.classification = nn.CrossEntropyLoss() if classification is None else classification
        self.ratio_weight = ratio_weight
        self.distill_weight = distill_weight
        self.token_distance: Literal["mse", "kl"] = token_distance
        # In a tuple, so that the teacher's weights are neither trained nor saved with this module.
        self._teacher = (teacher,)
        if teacher is not None:
            teacher.eval()

    def forward(self, output: DynamicViTOutput, images: Tensor, targets: Tensor) -> Tensor:
        """Return the total; same arguments and errors as :meth:`parts`."""
        return self.parts(output, images, targets).total

    def parts(self, output: DynamicViTOutput, images: Tensor, targets: Tensor) -> LossParts:
        """Return the total and its parts.

        Args:
            output: what the DynamicViT returned for `images`, in training mode.
            images: [B, channels, height, width], for the teacher.
            targets: of the classification loss.

        Raises:
            TypeError: `output` is not that of a DynamicViT in training mode.
            ValueError: the stages are not as many as the keep ratios, or teacher and model differ in logits
                or tokens.
        """
        if not isinstance(output, DynamicViTOutput):
            raise TypeError(
                f"output must be a DynamicViTOutput, got {type(output).__name__}: is the model in training "
                "mode?"
            )
        classification = self.classification(output.logits.float(), targets)
        ratio = ratio_loss(output.decisions, self.keep_ratios)
        logits = tokens = torch.zeros_like(ratio)
        (teacher,) = self._teacher
        if teacher is not None:
            taught, seen = _teach(teacher, images)
            for name, ours, theirs in (("logits", output.logits, taught), ("tokens", output.tokens, seen)):
                if ours.shape != theirs.shape:
                    raise ValueError(
                        f"model and teacher must agree in the shape of {name}, got {tuple(ours.shape)} and "
                        f"{tuple(theirs.shape)}"
                    )
            logits = logits_loss(output.logits, taught)
            tokens = token_loss(output.tokens, seen, output.mask, self.token_distance)
        total = classification + self.ratio_weight * ratio + self.distill_weight * (logits + tokens)
        return LossParts(total, classification, ratio, logits, tokens)


class DynamicViTTraining(Objective):
    """The losses of a :class:`evit_ext.models.dynamicvit.DynamicViT`, which has to be in training mode."""

    def __init__(self, loss: DynamicViTLoss) -> None:
        self.loss = loss

    def __call__(
        self, model: nn.Module, images: Tensor, targets: Tensor, token_labels: Tensor | None = None
    ) -> ObjectiveOutput:
        refuse_token_labels(token_labels)
        output = model(images)
        return ObjectiveOutput(self.loss(output, images, targets).float(), output.logits)


def ratio_loss(decisions: Sequence[Tensor], keep_ratios: Sequence[float]) -> Tensor:
    """Return the squared difference between the shares of kept patches and what they shall be.

    Args:
        decisions: for each stage [B, N], 1 for a patch that is left, else 0.
        keep_ratios: for each stage the share of patches that shall be left.

    Returns:
        The mean over stages and images.

    Raises:
        ValueError: there are not as many stages in both.
    """
    if len(decisions) != len(keep_ratios):
        raise ValueError(f"expected decisions of {len(keep_ratios)} stages, got {len(decisions)}")
    stages = zip(decisions, keep_ratios, strict=True)
    return torch.stack([(kept.mean(dim=1) - ratio).square().mean() for kept, ratio in stages]).mean()


def logits_loss(logits: Tensor, teacher: Tensor) -> Tensor:
    """Return KL(teacher ‖ model) of the class probabilities, the mean over images; of logits [B, classes]."""
    return _kl(logits, teacher).mean()


def token_loss(
    tokens: Tensor, teacher: Tensor, mask: Tensor, distance: Literal["mse", "kl"] = "mse"
) -> Tensor:
    """Return how far the tokens that are left are from the teacher's.

    Args:
        tokens: [B, N, C].
        teacher: [B, N, C].
        mask: [B, N], 1 for a patch that is left, else 0.
        distance: "mse", the squared difference, the mean over channels; or "kl", KL(teacher ‖ tokens) of
            their softmax over channels, the sum.

    Returns:
        The mean over all tokens that are left in the batch; 0 if there are none.
    """
    if distance == "mse":
        distances = (tokens.float() - teacher.float()).square().mean(dim=2)
    else:
        distances = _kl(tokens, teacher)
    return (distances * mask).sum() / mask.sum().clamp(min=1)


def _kl(logits: Tensor, teacher: Tensor) -> Tensor:
    ours, theirs = logits.float().log_softmax(dim=-1), teacher.float().log_softmax(dim=-1)
    return F.kl_div(ours, theirs, reduction="none", log_target=True).sum(dim=-1)


@torch.no_grad()
def _teach(teacher: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the teacher's logits [B, classes] and normalised patch tokens [B, N, C]."""
    features = teacher.forward_features(images)
    return teacher.forward_head(features), features[:, teacher.num_prefix_tokens :]
