"""What training minimises: an objective runs the model itself, and a teacher or an oracle."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from timm.utils.model import unwrap_model
from torch import Tensor, nn

from evit_ext.patching.oracle import Oracle
from evit_ext.tokens.stage import stages_of
from evit_ext.training.objectives.dynamicvit import DynamicViTLoss
from evit_ext.training.objectives.token_labels import TokenLabelLoss

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
        _refuse_token_labels(token_labels)
        logits = _logits(model(images))
        return ObjectiveOutput(self.criterion(logits.float(), targets), logits)


class Distillation(Objective):
    """DeiT's distillation: ``(1 - alpha) * criterion + alpha * distillation``.

    Touvron et al., "Training data-efficient image transformers & distillation through attention" (ICML 2021),
    section 4, with the normalisation of its published code:

    * "soft": KL(teacher ‖ model) of the class probabilities at temperature tau, times tau², the mean over
      images *and classes*. The paper's formula has no mean over classes; the published models were trained
      with its code, where the mean makes the term smaller by the number of classes.
    * "hard": cross-entropy with the teacher's most probable class.

    A distilled model (timm's VisionTransformerDistilled, ``deit_small_distilled``) in training mode learns
    the targets with its class head and from the teacher with its distillation head. Any other model, and any
    model in eval mode, learns both with the same logits.

    Args:
        criterion: of logits float32 [B, classes] and targets; the mean over the images.
        teacher: returns logits [B, classes] for the same images. It is frozen and put into eval mode.
        kind: "soft" or "hard".
        alpha: weight of the distillation, in [0, 1].
        tau: temperature of the soft distillation, positive.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        criterion: Criterion,
        teacher: nn.Module,
        kind: Literal["soft", "hard"] = "hard",
        alpha: float = 0.5,
        tau: float = 1.0,
    ) -> None:
        if kind not in ("soft", "hard"):
            raise ValueError(f"kind must be 'soft' or 'hard', got {kind!r}")
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha must be in [0, 1], got {alpha}")
        if not tau > 0:
            raise ValueError(f"tau must be positive, got {tau}")
        self.criterion = criterion
        self.teacher = teacher.requires_grad_(False).eval()
        self.kind = kind
        self.alpha = alpha
        self.tau = tau

    def __call__(
        self, model: nn.Module, images: Tensor, targets: Tensor, token_labels: Tensor | None = None
    ) -> ObjectiveOutput:
        _refuse_token_labels(token_labels)
        student: Any = unwrap_model(model)
        if hasattr(student, "set_distilled_training"):
            student.set_distilled_training(True)  # timm's switch between both heads' logits and their mean
        output = model(images)
        if isinstance(output, tuple) and len(output) == 2:
            logits, distilled = output
            both = (logits + distilled) / 2
        else:
            both = logits = distilled = _logits(output)
        with torch.no_grad():
            taught = _logits(self.teacher(images))
        if taught.shape != distilled.shape:
            raise ValueError(
                f"model and teacher must agree in the shape of logits, got {tuple(distilled.shape)} and "
                f"{tuple(taught.shape)}"
            )
        base = self.criterion(logits.float(), targets)
        loss = (1 - self.alpha) * base + self.alpha * self._distillation(distilled.float(), taught.float())
        return ObjectiveOutput(loss, both)

    def _distillation(self, logits: Tensor, taught: Tensor) -> Tensor:
        if self.kind == "hard":
            return F.cross_entropy(logits, taught.argmax(dim=1))
        ours, theirs = (logits / self.tau).log_softmax(dim=1), (taught / self.tau).log_softmax(dim=1)
        return F.kl_div(ours, theirs, reduction="sum", log_target=True) * self.tau**2 / logits.numel()


class DynamicViTTraining(Objective):
    """The losses of a :class:`evit_ext.models.dynamicvit.DynamicViT`, which has to be in training mode."""

    def __init__(self, loss: DynamicViTLoss) -> None:
        self.loss = loss

    def __call__(
        self, model: nn.Module, images: Tensor, targets: Tensor, token_labels: Tensor | None = None
    ) -> ObjectiveOutput:
        _refuse_token_labels(token_labels)
        output = model(images)
        return ObjectiveOutput(self.loss(output, images, targets).float(), output.logits)


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


class Guided(Objective):
    """Another objective, while an oracle chooses the patches that the model keeps.

    The oracle runs in every forward within :meth:`step`. The backward must be within it, too, because with
    gradient checkpointing blocks choose their patches again there.

    Args:
        objective: what is minimised.
        oracle: on the images' device.
    """

    def __init__(self, objective: Objective, oracle: Oracle) -> None:
        self.objective = objective
        self.oracle = oracle

    def __call__(
        self, model: nn.Module, images: Tensor, targets: Tensor, token_labels: Tensor | None = None
    ) -> ObjectiveOutput:
        """As :meth:`Objective.__call__`; RuntimeError outside of :meth:`step`."""
        if any(stage.guidance is None for stage in stages_of(unwrap_model(model))):
            raise RuntimeError(
                "the oracle does not guide the model: have `with objective.step(model):` around the forward "
                "and the backward"
            )
        return self.objective(model, images, targets, token_labels)

    @contextmanager
    def step(self, model: nn.Module) -> Iterator[None]:
        """See :meth:`Objective.step`; raises what :meth:`evit_ext.Oracle.guide` raises."""
        with self.oracle.guide(unwrap_model(model)), self.objective.step(model):
            yield

    def initialize(self, model: nn.Module) -> None:
        """Give `model` the oracle's weights; raises what :meth:`evit_ext.Oracle.initialize` raises."""
        self.oracle.initialize(unwrap_model(model))


def _logits(output: Any) -> Tensor:
    if not isinstance(output, Tensor):
        raise TypeError(
            f"the model must return logits [B, classes], got {type(output).__name__}: a DynamicViT needs "
            "DynamicViTTraining, and an LV-ViT with an auxiliary head TokenLabelTraining"
        )
    return output


def _refuse_token_labels(token_labels: Tensor | None) -> None:
    if token_labels is not None:
        raise ValueError("token_labels are for TokenLabelTraining, of an LV-ViT with an auxiliary head")
