"""Models by any name that is known: of this package or of timm, as an EViT or dense."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import timm
from timm.models import model_entrypoint
from torch import nn

import evit_ext.models as models
from evit_ext._util.messages import reason, shortened, shown
from evit_ext._util.spelling import unknown_model
from evit_ext.models.building import explaining_missing_network
from evit_ext.patching.applying import apply, remove
from evit_ext.patching.block import AdoptedBlock
from evit_ext.tokens.evit import EViT
from evit_ext.tokens.rule import Rule, rules_by_name
from evit_ext.tokens.stage import find_stages


def create_evit(
    name: str,
    keep_rate: float | Sequence[float] | None = None,
    drop_loc: Sequence[int] | None = None,
    fuse_token: bool | None = None,
    rule: str | Rule | Sequence[Rule] | None = None,
    rule_args: Mapping[str, Any] | None = None,
    **arguments: Any,
) -> nn.Module:
    """Build a model that drops patches.

    Args:
        name: of :mod:`evit_ext.models`, or of timm's registry, whose models :func:`evit_ext.apply` changes.
        keep_rate: share of the patches that a stage keeps, in (0, 1]; one number, or one for each stage; None
            for the model's default.
        drop_loc: numbers of the blocks where patches are dropped; None is those at the quarters of the depth.
        fuse_token: fuse the patches that are not kept into one token; ignored by a DynamicViT. None is True.
        rule: see :func:`evit_ext.apply`; then `keep_rate` and `fuse_token` must be None. Or the name of a
            rule, which gets the keep rate if it has one; `fuse_token` is then ignored.
        rule_args: further settings of a rule that is given by its name.
        arguments: of the model, such as ``img_size``, ``num_classes`` and ``pretrained``.

    Raises:
        TypeError: an argument that the model does not take, or of another type.
        ValueError: there is no such model, it cannot be an EViT, or an argument is out of range.
        RuntimeError: the pretrained weights could not be fetched.
    """
    if isinstance(rule, str):
        rule = rules_by_name(rule, keep_rate, rule_args or {})
        keep_rate = fuse_token = None
    elif rule_args:
        raise ValueError(
            f"rule_args are settings of a rule that is given by its name, got rule {shown(rule)}"
        )
    if rule is not None:
        return apply(create_dense(name, **arguments), keep_rate, drop_loc, fuse_token, rule=rule)
    fuse_token = fuse_token is None or fuse_token
    settings: dict[str, Any] = {"drop_loc": drop_loc}
    if keep_rate is not None:
        settings["keep_rate"] = keep_rate
    if not is_ours(name):
        return apply(create(name, **arguments), fuse_token=fuse_token, **settings)
    if rule_of(name) == EViT.name:
        settings["fuse_token"] = fuse_token
    return create(name, **settings, **arguments)


def create_dense(name: str, **arguments: Any) -> nn.Module:
    """Build a model that keeps all patches: for an EViT, the ViT it is made of.

    Same arguments and errors as :func:`create_evit`. Any timm model will do; a DynamicViT stays one.
    """
    if is_ours(name):
        arguments["drop_loc"] = None  # which fits any depth
    model = create(name, **arguments)
    return remove(model) if any(isinstance(stage, AdoptedBlock) for stage in find_stages(model)) else model


def create(name: str, **arguments: Any) -> nn.Module:
    """Build a model as it is; same arguments and errors as :func:`create_evit`."""
    if name not in models.__all__ and not timm.is_model(name):
        raise unknown_model(name, models.__all__, timm.list_models())
    what = (
        f"the pretrained weights of {name} could not be fetched from the Hugging Face hub, nor are they in "
        "its cache"
    )
    # Our own models say so themselves, and better: some weights come from elsewhere.
    pretrained = bool(arguments.get("pretrained"))
    with explaining_missing_network(pretrained and not is_ours(name), what):
        build = getattr(models, name) if name in models.__all__ else partial(timm.create_model, name)
        try:
            return build(**arguments)
        except TypeError as error:
            raise TypeError(f"{_cannot(name, arguments)}: {reason(error)}") from error
        # What models raise of arguments that make no sense: names that timm does not know, sizes of 0.
        except (ArithmeticError, AssertionError, AttributeError, LookupError) as error:
            raise ValueError(f"{_cannot(name, arguments)}: {reason(error)}") from error
        except RuntimeError as error:
            if pretrained:
                raise
            raise ValueError(f"{_cannot(name, arguments)}: {reason(error)}") from error


def _cannot(name: str, arguments: Mapping[str, Any]) -> str:
    return f"{name} cannot be built with {shortened(', '.join(arguments))}"


def takes_img_size(name: str) -> bool:
    """Return whether a model is built for a size of images, as vision transformers are and CNNs are not."""
    if is_ours(name):
        return True
    cfg = timm.get_pretrained_cfg(name, allow_unregistered=False) if timm.is_model(name) else None
    return cfg is None or cfg.fixed_input_size


def rule_of(name: str) -> str | None:
    """Return the name of the rule that a model of this package is built with; None for any other model."""
    if not is_ours(name):
        return None
    module = getattr(models, name).__module__ if name in models.__all__ else model_entrypoint(name).__module__
    return str(sys.modules[module].RULE)


def is_ours(name: str) -> bool:
    """Return whether a model is of this package, and drops patches without :func:`evit_ext.apply`."""
    if name in models.__all__:
        return True
    return timm.is_model(name) and model_entrypoint(name).__module__.startswith("evit_ext.")
