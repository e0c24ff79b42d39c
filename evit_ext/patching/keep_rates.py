"""The keep rates of a model that drops patches: an EViT or a DynamicViT."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from torch import nn

from evit_ext.patching.applying import check_keep_rates, switch_cpu_forwards
from evit_ext.patching.families import applied_blocks, reorganizing_blocks

Model = TypeVar("Model", bound=nn.Module)


def set_keep_rate(vit: Model, keep_rate: float | Sequence[float]) -> Model:
    """Change the keep rate of an EViT or a DynamicViT; in place, from the next forward on.

    Under ``torch.compile`` every new keep rate compiles the model again, and after
    ``torch._dynamo.config.recompile_limit`` of them (8 by default) torch stops compiling:
    :func:`evit_ext.training.allow_recompiles` raises that limit.

    Args:
        vit: a model that :func:`evit_ext.apply` changed, or a DynamicViT.
        keep_rate: share of the patch tokens to keep, in (0, 1]; one number, or one for each stage.

    Returns:
        `vit`.

    Raises:
        TypeError: a keep rate is not a number.
        ValueError: `vit` is neither, a keep rate is not in (0, 1], or their number is wrong.
    """
    inner: Any = getattr(vit, "_orig_mod", vit)  # torch.compile's wrapper
    if hasattr(inner, "score_predictor"):
        inner.keep_rate = keep_rate
        return vit
    blocks = applied_blocks(vit)
    rates = check_keep_rates(keep_rate, len(blocks))
    for block, rate in zip(blocks, rates, strict=True):
        block.keep_rate = rate
    switch_cpu_forwards(inner, rates)
    return vit


def keep_rates(model: Any) -> list[float]:
    """Return the keep rate of each stage; a single one if all are the same, and [1] if there is no stage.

    Args:
        model: any module, not wrapped.
    """
    if hasattr(model, "score_predictor"):
        rate = model.keep_rate
        rates = list(rate) if isinstance(rate, tuple) else [rate]
    else:
        rates = [block.keep_rate for block in reorganizing_blocks(model)] or [1.0]
    return rates[:1] if len(set(rates)) == 1 else rates
