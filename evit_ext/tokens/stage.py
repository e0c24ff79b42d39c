"""The modules of a model at which tokens are reduced: the one answer to which these are.

A reorganising block of :func:`evit_ext.apply` is a stage, and so is a predictor of a DynamicViT.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, nn

from evit_ext.tokens.plan import Plan
from evit_ext.tokens.rule import Rule
from evit_ext.tokens.trail import TokenTrail


class Recorder(Protocol):
    """What a stage reports to."""

    @property
    def keep_tokens(self) -> bool:
        """Whether it wants the tokens that the stage chose from, too."""

    def add(self, stage: int, plan: Plan, tokens: Tensor | None) -> None:
        """Receive what stage number `stage` did with its tokens [B, N, C]."""


class Guide(Protocol):
    """What may choose the patches in the place of a stage's own scores."""

    def scores(self, stage: int, x: Tensor, num_patches: int) -> Tensor:
        """Return scores [B, num_patches] of the patch tokens in `x` [B, N, C] that enter a stage."""

    def add(self, stage: int, plan: Plan) -> None:
        """Receive what stage number `stage` did."""


class Stage(nn.Module):
    """A module at which a model's tokens are reduced.

    Attributes:
        rule: decides how.
        stage: number of the stages before it.
        recorders: the active records, each with this stage's number in that record.
        guidance: set while an oracle decides which patches to keep.
    """

    rule: Rule
    stage: int
    recorders: tuple[tuple[Recorder, int], ...]
    guidance: Guide | None

    @property
    def keep_rate(self) -> float | None:
        """The rule's keep rate."""
        return self.rule.keep_rate

    def wants_tokens(self) -> bool:
        """Return whether an active record wants the tokens that the stage chooses from."""
        return any(record.keep_tokens for record, _ in self.recorders)

    def report(self, plan: Plan, trail: TokenTrail | None = None, tokens: Tensor | None = None) -> None:
        """Tell the trail, the oracle and the records what `plan` did with `tokens` [B, N, C]."""
        if not plan.keeps_all:
            if trail is not None:
                trail.add(self.stage, plan)
            if self.guidance is not None:
                self.guidance.add(self.stage, plan)
        for record, stage in self.recorders:
            record.add(stage, plan, tokens)

    def __getstate__(self) -> dict[str, Any]:
        # A copy or a saved model takes no part in a recording or an oracle's guidance.
        # nn.Module's own method drops the compiled call, which is bound to this object.
        return {**super().__getstate__(), "recorders": (), "guidance": None}


def find_stages(model: nn.Module) -> list[Stage]:
    """Return the stages of `model` in order, whatever wraps it or its blocks; empty if it has none.

    Raises:
        ValueError: it holds several models that reduce tokens.
    """
    found = [module for module in model.modules() if isinstance(module, Stage)]
    if len({stage.stage for stage in found}) < len(found):
        raise ValueError(f"{type(model).__name__} holds several models that reduce tokens: pass one of them")
    return sorted(found, key=lambda stage: stage.stage)


def stages_of(model: nn.Module) -> list[Stage]:
    """Return the stages of `model` in order; ValueError if it has none."""
    found = find_stages(model)
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no block that reorganises tokens: call evit_ext.apply first"
        )
    return found
