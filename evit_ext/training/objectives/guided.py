"""Training while an oracle, a trained ViT, chooses the patches that the model keeps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from timm.utils.model import unwrap_model
from torch import Tensor, nn

from evit_ext.patching.oracle import Oracle
from evit_ext.tokens.stage import stages_of
from evit_ext.training.objectives.objective import Objective, ObjectiveOutput


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
