"""The keep rates of a model that drops patches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from torch import nn

from evit_ext.patching.applying import switch_cpu_forwards
from evit_ext.tokens.keep_rate import check_keep_rates
from evit_ext.tokens.stage import find_stages, stages_of

Model = TypeVar("Model", bound=nn.Module)


def set_keep_rate(vit: Model, keep_rate: float | Sequence[float]) -> Model:
    """Change the keep rate of a model that drops patches; in place, from the next forward on.

    Under ``torch.compile`` every new keep rate compiles the model again, and after
    ``torch._dynamo.config.recompile_limit`` of them (8 by default) torch stops compiling:
    :func:`evit_ext.training.allow_recompiles` raises that limit.

    Args:
        vit: a model that :func:`evit_ext.apply` changed, or a DynamicViT; wrapped or not, and so its blocks.
        keep_rate: share of the patch tokens to keep, in (0, 1]; one number, or one for each stage. A NumPy
            number or a tensor without dimensions will do.

    Returns:
        `vit`.

    Raises:
        TypeError: a keep rate is not a number.
        ValueError: `vit` is neither, a keep rate is not in (0, 1], their number is wrong, or the model's rule
            has no keep rate.
    """
    stages = stages_of(vit)
    rates = check_keep_rates(keep_rate, len(stages))
    # All of them before any is set.
    rules = [stage.rule.with_keep_rate(rate) for stage, rate in zip(stages, rates, strict=True)]
    for stage, rule in zip(stages, stages[0].rule.in_turn(rules), strict=True):
        stage.rule = rule
    switch_cpu_forwards(vit)
    return vit


def keep_rates(model: nn.Module) -> list[float]:
    """Return the keep rate of each stage; a single one if all are the same.

    [1] if there is no stage, and nothing where a stage has a rule without a keep rate.
    """
    rates = [stage.keep_rate for stage in find_stages(model)] or [1.0]
    known = [rate for rate in rates if rate is not None]
    if len(known) < len(rates):
        return []
    return known[:1] if len(set(known)) == 1 else known
