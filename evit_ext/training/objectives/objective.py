"""What training minimises: an objective runs the model, and returns the loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import timm.loss
from torch import Tensor, nn

from evit_ext.training.recipe import Recipe

Criterion = Callable[[Tensor, Tensor], Tensor]


class ObjectiveOutput(NamedTuple):
    """What an objective returns.

    Attributes:
        loss: scalar, float32, the mean over the images.
        logits: [B, classes], for counting right answers; of a distilled model the mean of both heads'.
    """

    loss: Tensor
    logits: Tensor


class Objective(ABC):
    """What training minimises. A training step is::

        with objective.step(model):
            loss, logits = objective(model, images, targets)
            loss.backward()

    For mixed precision, run this under autocast, which then also applies to teachers and oracles. These do
    not belong to the model: they are frozen, in eval mode and in no state dict. Put them on the images'
    device.
    """

    @abstractmethod
    def __call__(
        self, model: nn.Module, images: Tensor, targets: Tensor, token_labels: Tensor | None = None
    ) -> ObjectiveOutput:
        """Run the model and return the loss.

        Args:
            model: the model to train, wrapped (DistributedDataParallel, fully_shard, torch.compile) or not.
            images: [B, channels, height, width], after mixup or CutMix if these are used.
            targets: int64 [B], or probabilities [B, classes], float, mixed as the images are.
            token_labels: probabilities [B, patches, classes], float, row by row; only
                :class:`TokenLabelTraining` takes them.

        Raises:
            TypeError: the model returns something that the objective is not made for.
            ValueError: shapes do not match, or `token_labels` are given to an objective that has no use for
                them.
        """

    def step(self, model: nn.Module) -> AbstractContextManager[None]:
        """Return a context that must be open from before the forward until after the backward.

        It may contain several forwards, each with its backward. Evaluate outside of it.
        """
        return nullcontext()

    def initialize(self, model: nn.Module) -> None:  # noqa: B027  # most have none
        """Give `model` the weights to start from, if the objective has any.

        At the start of a run only, before the model is sharded and a moving average of it is made.
        """


class Classification(Objective):
    """A criterion on the logits.

    Args:
        criterion: of logits float32 [B, classes] and targets; the mean over the images.
    """

    def __init__(self, criterion: Criterion) -> None:
        self.criterion = criterion

    def __call__(
        self, model: nn.Module, images: Tensor, targets: Tensor, token_labels: Tensor | None = None
    ) -> ObjectiveOutput:
        refuse_token_labels(token_labels)
        logits = logits_of(model(images))
        return ObjectiveOutput(self.criterion(logits.float(), targets), logits)


def build_criterion(recipe: Recipe) -> nn.Module:
    """Return the cross-entropy for the targets that a recipe makes: of probabilities, smoothed, or plain.

    With mixup or CutMix, timm's Mixup makes probabilities, and smooths them.
    """
    if recipe.mixup > 0 or recipe.cutmix > 0:
        return timm.loss.SoftTargetCrossEntropy()
    if recipe.label_smoothing > 0:
        return timm.loss.LabelSmoothingCrossEntropy(recipe.label_smoothing)
    return nn.CrossEntropyLoss()


def logits_of(output: Any) -> Tensor:
    """Return what a model returned, if it is logits [B, classes]; TypeError otherwise."""
    if not isinstance(output, Tensor):
        raise TypeError(
            f"the model must return logits [B, classes], got {type(output).__name__}: a DynamicViT needs "
            "DynamicViTTraining, and an LV-ViT with an auxiliary head TokenLabelTraining"
        )
    return output


def refuse_token_labels(token_labels: Tensor | None) -> None:
    """Raise ValueError for token labels, in an objective that has no use for them."""
    if token_labels is not None:
        raise ValueError("token_labels are for TokenLabelTraining, of an LV-ViT with an auxiliary head")
