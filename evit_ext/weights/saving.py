"""Saving models to a folder or to a repository on the Hugging Face hub."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from timm.models._hub import save_config_for_hf
from timm.utils.model import unwrap_model
from torch import nn

from evit_ext._util.files import private_folder, put
from evit_ext._util.messages import shown
from evit_ext._util.modes import eval_mode
from evit_ext._util.version import VERSION
from evit_ext.cost.macs import input_size
from evit_ext.models.building import is_connection_error
from evit_ext.models.by_name import is_ours, rule_of
from evit_ext.patching.families import drop_locations, locate
from evit_ext.patching.keep_rates import keep_rates
from evit_ext.tokens.evit import EViT
from evit_ext.tokens.stage import find_stages
from evit_ext.weights.card import model_card
from evit_ext.weights.pretrained import BESIDE, CONFIG, ENTRY, WEIGHTS, from_pretrained

_CARD = "README.md"

#: Recorded arguments that concern the initial weights, not the model itself.
_OF_BEGINNINGS = ("weight_init", "pretrained_strict")


def save_pretrained(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    label_names: Sequence[str] | None = None,
    pretrained_cfg: Mapping[str, Any] | None = None,
    model_args: Mapping[str, Any] | None = None,
    license: str | None = None,
    description: str = "",
    repo_id: str | None = None,
) -> Path:
    """Write a model with its keep rate to a folder: config.json, model.safetensors and a card, README.md.

    The files are in timm's format. :func:`evit_ext.from_pretrained` returns the same model.
    ``timm.create_model("local-dir:folder", pretrained=True)`` also does for models of :mod:`evit_ext.models`,
    if evit_ext is imported. For a model that :func:`evit_ext.apply` changed, it returns the one without token
    reorganisation, even where evit_ext is not installed.

    Before the files replace those in the folder, they are loaded and an image goes through both models, so
    that the folder never ends up with files that cannot be loaded again.

    Args:
        model: one of :mod:`evit_ext.models`, or a timm model that :func:`evit_ext.apply` changed; wrapped
            (DistributedDataParallel, torch.compile) or not.
        folder: created if missing; other files in it stay, and so does a README.md.
        label_names: a name for each class.
        pretrained_cfg: timm's entries that differ from the model's own, such as ``mean``, ``std`` and
            ``crop_pct`` of its images.
        model_args: arguments that the model was built with. Newer versions of timm (1.0.31) remember those of
            ``timm.create_model``. With older ones, pass whatever the model's name does not imply, except the
            image size and the token reorganisation.
        license: of the weights, for the card, such as "apache-2.0".
        description: text for the card.
        repo_id: on the hub, for the card's title and example; default "owner/" and the folder's name.

    Returns:
        The folder.

    Raises:
        TypeError: `model` is not a module, or timm does not know an entry.
        ValueError: the model cannot be built again from a name and arguments, the files would hold a
            different model, or `label_names` does not have one name for each class.
        OSError: the folder cannot be written.
    """
    vit = _savable(model, label_names)
    target = Path(folder).expanduser()
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"{target} is a file: give a folder")
    target.mkdir(parents=True, exist_ok=True)
    # In a folder apart, so that files that cannot be loaded never replace existing ones.
    with private_folder(target, "saving") as new:
        config = _write_config(vit, new / CONFIG, label_names, pretrained_cfg, model_args)
        state = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in vit.state_dict().items()}
        safetensors.torch.save_file(state, new / WEIGHTS, metadata={"format": "pt"})
        _compare(vit, new)
        card = model_card(vit, config, repo_id or f"owner/{target.resolve().name}", license, description)
        (new / _CARD).write_text(card, encoding="utf-8")
        for file in (WEIGHTS, CONFIG, _CARD):
            if file != _CARD or not (target / _CARD).exists():
                put(new / file, target / file)
    return target


def push_to_hub(
    model: nn.Module,
    repo_id: str,
    *,
    private: bool = False,
    token: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Add model",
    **settings: Any,
) -> str:
    """Write a model to a repository on the Hugging Face hub, which is created if missing.

    The files are those of :func:`save_pretrained`. An existing README.md stays. The tests use a stand-in for
    the hub; this has not been tried with the hub itself.

    Args:
        model: as in :func:`save_pretrained`.
        repo_id: "owner/name".
        private: make a new repository private; an existing one does not change.
        token: for the hub; default that of ``hf auth login`` or the variable HF_TOKEN.
        revision: branch to write to; default main.
        create_pr: open a pull request instead.
        commit_message: of the commit.
        settings: of :func:`save_pretrained`: ``label_names``, ``pretrained_cfg``, ``model_args``,
            ``license``, ``description``.

    Returns:
        The URL of the commit.

    Raises:
        TypeError, ValueError: as :func:`save_pretrained`; or `repo_id` is not "owner/name".
        RuntimeError: the hub could not be reached, or refused the request.
    """
    if not isinstance(repo_id, str) or repo_id.count("/") != 1 or not all(repo_id.split("/")):
        raise ValueError(f"repo_id must be 'owner/name', got {shown(repo_id)}")
    import huggingface_hub  # takes a while

    with tempfile.TemporaryDirectory() as folder:
        # Before any request to the hub, so that a model that cannot be saved does not leave a repository.
        save_pretrained(model, folder, repo_id=repo_id, **settings)
        api = huggingface_hub.HfApi(token=token, library_name="evit_ext", library_version=VERSION)
        try:
            api.create_repo(repo_id, private=private, exist_ok=True)
            if api.file_exists(repo_id, _CARD, revision=revision):
                (Path(folder) / _CARD).unlink()
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                revision=revision,
                create_pr=create_pr,
                commit_message=commit_message,
            )
        except Exception as error:
            if is_connection_error(error):
                said = str(error).strip().partition("\n")[0]
                raise RuntimeError(
                    f"{repo_id} could not be written to the Hugging Face hub ({type(error).__name__}: {said})"
                    ". Without a network, use evit_ext.save_pretrained and upload the folder later"
                ) from error
            raise
    return str(commit.commit_url)


def _savable(model: nn.Module, label_names: Sequence[str] | None) -> Any:
    """Return the model inside its wrappers; raise if it cannot be saved."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch module, got {type(model).__name__}")
    vit: Any = unwrap_model(model)
    name = type(vit).__name__
    if not (getattr(vit, "pretrained_cfg", None) or {}).get("architecture") or not hasattr(
        vit, "num_classes"
    ):
        raise ValueError(
            f"{name} cannot be saved: expected a model of evit_ext.models or timm.create_model, which can be "
            "built again by its name; a model of transformers has a save_pretrained of its own"
        )
    if not find_stages(vit):
        raise ValueError(f"{name} does not reorganise tokens: call evit_ext.apply first")
    if label_names is not None and len(label_names) != vit.num_classes:
        raise ValueError(
            f"expected {vit.num_classes} label_names, one for each class, got {len(label_names)}"
        )
    dtypes = {parameter.dtype for parameter in vit.parameters()}
    if len(dtypes) > 1:
        raise ValueError(
            f"{name} cannot be saved: its parameters have several dtypes, {sorted(map(str, dtypes))}"
        )
    return vit


def _write_config(
    vit: Any,
    file: Path,
    label_names: Sequence[str] | None,
    pretrained_cfg: Mapping[str, Any] | None,
    model_args: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Write config.json and return its contents."""
    evit = reduction(vit)
    channels, size = input_size(vit, None)
    arguments = dict(model_args or {})
    if is_ours(vit.pretrained_cfg["architecture"]) and not BESIDE & evit.keys():
        arguments.update(evit)  # so that timm builds it with them too
    if getattr(getattr(vit, "patch_embed", None), "img_size", None):
        arguments.setdefault("img_size", list(size))
    settings: dict[str, Any] = {"pretrained_cfg": {"input_size": (channels, *size), **(pretrained_cfg or {})}}
    if label_names is not None:
        settings["label_names"] = list(label_names)
    path: Any = file  # older versions of timm take only a Path, newer ones declare a str
    save_config_for_hf(vit, path, settings, arguments)
    config: dict[str, Any] = json.loads(file.read_text("utf-8"))
    for name in _OF_BEGINNINGS:
        config.get("model_args", {}).pop(name, None)
    dtype = next(vit.parameters()).dtype
    config[ENTRY] = {**evit, "dtype": str(dtype).removeprefix("torch."), "version": VERSION}
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return config


def reduction(vit: Any) -> dict[str, Any]:
    """Return how the tokens of `vit` are reduced, as :func:`from_pretrained` reads it.

    A model that is built with its rule, and a timm model with EViT's, has that rule's settings as entries.
    Any other has the name of its rule and, as "settings", those of all stages or a list of each stage's.

    Raises:
        ValueError: the stages have different rules.
    """
    stages, located = find_stages(vit), locate(vit)
    assert located is not None
    names = sorted({stage.rule.name for stage in stages})
    if len(names) > 1:
        raise ValueError(f"the stages must have one rule, got {', '.join(names)}")
    every = [stage.rule.settings() for stage in stages]
    entries: dict[str, Any] = {"drop_loc": drop_locations(vit)}
    # One keep rate a stage is what the models' own arguments take; of other settings, one for all.
    others = [{name: value for name, value in each.items() if name != "keep_rate"} for each in every]
    if names[0] == (rule_of(vit.pretrained_cfg["architecture"]) or EViT.name) and others.count(
        others[0]
    ) == len(others):
        rates = keep_rates(vit)
        entries = {"keep_rate": rates[0] if len(rates) == 1 else rates, **others[0], **entries}
    else:
        same = every.count(every[0]) == len(every)
        entries |= {"rule": names[0], "settings": every[0] if same else every}
    prefix = {getattr(stage, "num_prefix_tokens", None) for stage in stages} - {None}
    if prefix and prefix != {located.family.num_prefix_tokens(located.vit)}:
        entries["num_prefix_tokens"] = prefix.pop()
    return entries


def _compare(vit: nn.Module, folder: Path) -> None:
    """Raise ValueError unless the saved model and `vit` give the same logits for an image."""
    reason = "its config.json does not have all that the model was built with; say it in model_args"
    try:
        loaded = from_pretrained(folder)
    except ValueError as error:
        raise ValueError(f"{type(vit).__name__} cannot be loaded again: {reason}: {error}") from error
    like = next(vit.parameters())
    channels, size = input_size(vit, None)
    images = torch.randn(2, channels, *size, generator=torch.Generator().manual_seed(0)).to(like)
    with eval_mode(vit), torch.no_grad():
        # Rules may draw random numbers: the same ones.
        logits = []
        for model in (vit, loaded.to(like.device)):
            with torch.random.fork_rng(devices=[like.device] if like.is_cuda else []):
                torch.manual_seed(0)
                logits.append(model(images).float())
    expected, found = logits
    same = torch.allclose(expected, found, rtol=1e-3, atol=1e-3, equal_nan=True)
    if not same or _stages_of(loaded) != _stages_of(vit):
        raise ValueError(f"{type(vit).__name__} would be loaded as another model: {reason}")


def _stages_of(vit: nn.Module) -> list[Any]:
    return [
        (stage.rule.name, json.dumps(stage.rule.settings()), getattr(stage, "num_prefix_tokens", None))
        for stage in find_stages(vit)
    ]
