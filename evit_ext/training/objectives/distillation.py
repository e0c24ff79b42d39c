"""Learning from a teacher: DeiT's distillation, soft or hard."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.utils.model import unwrap_model
from torch import Tensor, nn

from evit_ext._util.messages import shown
from evit_ext.training.objectives.objective import (
    Criterion,
    Objective,
    ObjectiveOutput,
    logits_of,
    refuse_token_labels,
)


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
            raise ValueError(f"kind must be 'soft' or 'hard', got {shown(kind)}")
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
        refuse_token_labels(token_labels)
        student: Any = unwrap_model(model)
        if hasattr(student, "set_distilled_training"):
            student.set_distilled_training(True)  # timm's switch between both heads' logits and their mean
        output = model(images)
        if isinstance(output, tuple) and len(output) == 2:
            logits, distilled = output
            both = (logits + distilled) / 2
        else:
            both = logits = distilled = logits_of(output)
        with torch.no_grad():
            taught = logits_of(self.teacher(images))
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
