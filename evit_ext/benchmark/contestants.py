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
        keep_rate: of its stages; 1 for a dense model.
        gmacs: multiply-accumulates per image in 10^9; None if they were not counted.
    """

    name: str
    model: nn.Module
    keep_rate: float
    gmacs: float | None


def contestants(
    name: str,
    keep_rates: Sequence[float] = (0.7, 0.5),
    device: torch.device | str = "cpu",
    reduction: Mapping[str, Any] | None = None,
    **arguments: Any,
) -> list[Contestant]:
    """Return a model's dense form and, for each keep rate, a form that drops patches, with the same weights.

    The dense form is the fastest ordinary way to run the model: timm's own modules, with
    scaled_dot_product_attention. A dense DynamicViT keeps all patches, and also its predictors.

    Args:
        name: from :mod:`evit_ext.models` or timm's registry.
        keep_rates: each in (0, 1].
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
    state = dense.state_dict()
    for keep_rate in keep_rates:
        model = create_evit(name, keep_rate=keep_rate, **(reduction or {}), **arguments).to(device).eval()
        model.load_state_dict(state)
        title = find_stages(model)[0].rule.title
        found.append(Contestant(f"{title} {keep_rate:g}", model, keep_rate, _gmacs(model, arguments)))
    return found


def _gmacs(model: nn.Module, arguments: dict[str, Any]) -> float:
    return count_macs(model, arguments.get("img_size")) / 1e9
