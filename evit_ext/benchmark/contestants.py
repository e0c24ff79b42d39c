"""The models in a benchmark: a dense one and the same one dropping patches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from evit_ext.cost.macs import count_macs
from evit_ext.models.by_name import create_dense, create_evit
from evit_ext.patching.keep_rates import set_keep_rate
from evit_ext.tokens.stage import find_stages


@dataclass(frozen=True)
class Contestant:
    """A model in a benchmark.

    Attributes:
        name: to be shown.
        model: in eval mode, in which it returns logits; on its device.
        keep_rate: of its stages; 1 for a dense model, None for a rule that is not set by one.
        gmacs: multiply-accumulates per image in 10^9; None if they were not counted.
    """

    name: str
    model: nn.Module
    keep_rate: float | None
    gmacs: float | None


def contestants(
    name: str,
    keep_rates: Sequence[float | None] = (0.7, 0.5),
    device: torch.device | str = "cpu",
    reduction: Mapping[str, Any] | None = None,
    **arguments: Any,
) -> list[Contestant]:
    """Return a model's dense form and, for each keep rate, a form that drops patches, with the same weights.

    The dense form is the fastest ordinary way to run the model: timm's own modules, with
    scaled_dot_product_attention. A dense DynamicViT keeps all patches, and also its predictors.

    Args:
        name: from :mod:`evit_ext.models` or timm's registry.
        keep_rates: each in (0, 1]; None leaves it to the rule and its settings.
        device: where to put the models.
        reduction: how tokens are dropped, besides the keep rate: drop_loc, fuse_token, rule and rule_args.
        arguments: of the model, such as ``img_size``.

    Raises:
        TypeError, ValueError: as :func:`evit_ext.models.by_name.create_evit`.
    """
    dense = create_dense(name, **arguments).to(device).eval()
    if find_stages(dense):
        set_keep_rate(dense, 1.0)
    found = [Contestant("dense", dense, 1.0, _gmacs(dense, arguments))]
    state, given = dense.state_dict(), dict(reduction or {})
    for keep_rate in keep_rates:
        # A rule by its name has its settings first, and then the keep rate, which may replace one of them.
        by_name = bool(given.get("rule"))
        model = create_evit(name, keep_rate=None if by_name else keep_rate, **given, **arguments)
        if by_name and keep_rate is not None:
            set_keep_rate(model, keep_rate)
        model = model.to(device).eval()
        model.load_state_dict(state)
        rule = find_stages(model)[0].rule
        settings = {"": f"{rule.keep_rate:g}"} if rule.keep_rate is not None else given.get("rule_args", {})
        title = " ".join([rule.title, *(f"{key} {value}".strip() for key, value in settings.items())])
        found.append(Contestant(title, model, rule.keep_rate, _gmacs(model, arguments)))
    return found


def _gmacs(model: nn.Module, arguments: dict[str, Any]) -> float:
    return count_macs(model, arguments.get("img_size")) / 1e9
