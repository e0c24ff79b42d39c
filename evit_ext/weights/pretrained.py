"""Models from a folder or a repository of the Hugging Face hub."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from evit_ext._util.messages import reason, shown
from evit_ext._util.places import HUB_PREFIXES
from evit_ext.models.by_name import create, create_dense, is_ours
from evit_ext.patching.applying import apply
from evit_ext.patching.keep_rates import set_keep_rate
from evit_ext.tokens.evit import EViT
from evit_ext.tokens.rule import Rule, make_rule, rules_by_name
from evit_ext.weights.limits import no_larger_than
from evit_ext.weights.loading import load_checkpoint
from evit_ext.weights.source import hub_file

#: The files of a model, as timm names them.
CONFIG, WEIGHTS = "config.json", "model.safetensors"

#: The entry of config.json about token reorganisation, which timm ignores.
ENTRY = "evit"

#: Entries of it that are beside what the models of this package take as arguments.
BESIDE = frozenset({"rule", "settings", "num_prefix_tokens"})

#: Entries of it that are no settings of the rule.
_NOT_OF_A_RULE = BESIDE | {"drop_loc", "dtype", "version"}

#: Bytes that a config.json has at most; that of ImageNet's 21,841 classes with descriptions has 3 million.
_LARGEST = 2**24

#: Arguments of timm.create_model for where weights come from; here they are in the folder.
_NOT_OF_A_MODEL = frozenset(
    {"model_name", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"}
)


def from_pretrained(
    source: str | os.PathLike[str], keep_rate: float | Sequence[float] | None = None
) -> nn.Module:
    """Return the model that :func:`evit_ext.save_pretrained` or :func:`evit_ext.push_to_hub` wrote.

    Nothing in the files is executed: the model is built by its name in :mod:`evit_ext.models` or timm, and
    the weights are safetensors.

    Args:
        source: a folder, or ``hf-hub:owner/name`` with or without ``@revision``.
        keep_rate: replaces the saved keep rate: one number, or one for each stage.

    Returns:
        The model in eval mode on the CPU, with the reorganising blocks, weights and dtype that were saved.

    Raises:
        FileNotFoundError, NotADirectoryError: the folder does not exist, or lacks a file.
        ValueError: config.json is damaged, names an unknown model or unknown arguments, or asks for a model
            that takes many times the memory of the weights; the weights do not fit; or `keep_rate` is out of
            range or does not have one number for each stage.
        TypeError: `keep_rate` is neither a number nor a list of numbers.
        RuntimeError: the model could not be fetched from the hub.

    Example:
        >>> model = evit_ext.from_pretrained("hf-hub:owner/name")
        >>> transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    """
    config_file = _find(source, CONFIG)
    config = _read(config_file)
    weights = _find(source, WEIGHTS)
    try:
        with no_larger_than(weights):
            model = _build(config)
    except Exception as error:  # what models raise of arguments that make no sense is anything
        if isinstance(error, (OSError, MemoryError)):
            raise
        raise ValueError(f"{config_file} names a model that cannot be built: {reason(error)}") from error
    if keep_rate is not None:
        set_keep_rate(model, keep_rate)
    load_checkpoint(model, weights)
    return model.eval()


def _find(source: str | os.PathLike[str], name: str) -> Path:
    """Return a file of a model, fetched from the hub if `source` is there."""
    if isinstance(source, str) and source.startswith(HUB_PREFIXES):
        return hub_file(source, (name,))
    folder = Path(source).expanduser()
    if not folder.exists():
        raise FileNotFoundError(
            f"there is no folder {folder}; of the Hugging Face hub, give hf-hub:owner/name"
        )
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is no folder: evit_ext.load_checkpoint loads a file of weights")
    if not (folder / name).is_file():
        raise FileNotFoundError(f"there is no {folder / name}: expected what evit_ext.save_pretrained writes")
    return folder / name


def _read(file: Path) -> dict[str, Any]:
    """Return the contents of config.json, checked for the required entries."""
    size = file.stat().st_size
    if size > _LARGEST:
        raise ValueError(f"{file} has {size} bytes, expected at most {_LARGEST}")
    try:
        config = json.loads(file.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is damaged, no JSON: {reason(error)}") from error
    kinds = {"architecture": str, "pretrained_cfg": dict, ENTRY: dict}
    for entry, kind in kinds.items():
        if isinstance(config, dict) and isinstance(config.get(entry), kind):
            continue
        hint = "; for a model of timm's use timm.create_model and evit_ext.apply" if entry == ENTRY else ""
        raise ValueError(
            f"{file} has no entry {entry!r}: expected what evit_ext.save_pretrained writes{hint}"
        )
    return dict(config)


def _rules(evit: dict[str, Any]) -> Rule | list[Rule]:
    """Return the rule of a config.json, or one for each stage; TypeError or ValueError if there is none."""
    name, settings = evit.get("rule", EViT.name), evit.get("settings")
    if not isinstance(name, str):
        raise ValueError(f"rule must be the name of a rule, got {shown(name)}")
    if settings is None:
        others = {key: value for key, value in evit.items() if key not in _NOT_OF_A_RULE}
        return rules_by_name(name, others.pop("keep_rate", None), others)
    every = settings if isinstance(settings, list) else [settings]
    if not all(isinstance(each, dict) for each in every):
        raise ValueError(
            f"settings must be those of a rule, or a list of each stage's, got {shown(settings)}"
        )
    rules = [make_rule(name, each) for each in every]
    return rules if isinstance(settings, list) else rules[0]


def _build(config: dict[str, Any]) -> nn.Module:
    """Build the model of a config.json, without its weights; TypeError or ValueError if that fails."""
    name, evit = config["architecture"], config[ENTRY]
    arguments = config.get("model_args") or {}
    if not isinstance(arguments, dict):
        raise ValueError(f"model_args must be a mapping of names to values, got {shown(arguments)}")
    arguments = dict(arguments)
    refused = sorted(_NOT_OF_A_MODEL & arguments.keys())
    if refused:
        raise ValueError(f"model_args must be arguments of the model, got {', '.join(refused)}")
    # JSON has no tuples, but timm uses them for the image size and normalisation.
    cfg = {key: tuple(v) if isinstance(v, list) else v for key, v in config["pretrained_cfg"].items()}
    for entry in ("num_classes", "label_names", "label_descriptions"):  # as timm does
        if entry in config:
            cfg[entry] = config[entry]
    arguments.setdefault("num_classes", cfg.get("num_classes"))
    drop_loc = evit.get("drop_loc")
    if is_ours(name) and not BESIDE & evit.keys():
        settings = {key: value for key, value in evit.items() if key not in _NOT_OF_A_RULE}
        model = create(name, pretrained_cfg=cfg, **{**arguments, **settings, "drop_loc": drop_loc})
    else:
        dense = create_dense(name, pretrained_cfg=cfg, **arguments)
        prefix = evit.get("num_prefix_tokens")
        model = apply(dense, drop_loc=drop_loc, rule=_rules(evit), num_prefix_tokens=prefix)
    dtype = getattr(torch, str(evit.get("dtype", "float32")), None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"dtype must be one of torch's, such as 'float32', got {shown(evit['dtype'])}")
    return model.to(dtype)
