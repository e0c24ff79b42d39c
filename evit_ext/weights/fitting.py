"""Make a checkpoint's weights fit a model, or say why they do not."""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from evit_ext._util.messages import shortened
from evit_ext.models.deit import DeiT
from evit_ext.models.position_embedding import resize_position_embedding
from evit_ext.weights.layout import architecture

_SHOWN = 10
_HEADS = ("head", "head_dist", "aux_head")


@dataclass
class Fitted:
    """What is to be loaded, and what was done to it.

    Attributes:
        state: tensors that have the shapes of the model's.
        missing: keys of the model that keep the weights they have, other than those of `heads`.
        unexpected: keys of the file that the model does not have.
        resized: keys whose weights were resized.
        heads: keys of heads that keep the weights they have.
        problems: what does not fit, a sentence each.
        told: keys that a problem is about already.
    """

    state: dict[str, Tensor]
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)
    heads: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    told: list[str] = field(default_factory=list)


def fit(
    state: Mapping[str, Tensor],
    others: Collection[str],
    model: nn.Module,
    *,
    strict: bool,
    resize_pos_embed: bool | tuple[int, int],
    resize_head: bool,
) -> Fitted:
    """Return `state` as `model` can take it. The model is not touched, nor are the tensors in `state`.

    Args:
        state: a bare model's weights.
        others: keys of the same file that have no tensor.
        model: without wrappers.
        strict, resize_pos_embed, resize_head: as of :func:`evit_ext.load_checkpoint`.

    Raises:
        ValueError: the weights are those of another architecture, or of another size of it.
    """
    own = {key: value for key, value in model.state_dict().items() if isinstance(value, Tensor)}
    _check_architecture(state, own, model, strict)
    fitted = Fitted(dict(state))
    same = state.keys() == own.keys() and all(value.shape == own[key].shape for key, value in state.items())
    if not same:
        _filter_like_timm(fitted, model, bool(resize_pos_embed))
    if not fitted.state.keys() & own.keys():
        raise ValueError(
            f"none of the weights' {len(state)} keys is one of {type(model).__name__}'s {len(own)}: they "
            f"begin with {_some(list(state), 3)}, its with {_some(list(own), 3)}"
        )
    _fit_position_embedding(fitted, model, resize_pos_embed)
    _fit_heads(fitted, own, model, resize_head)
    _compare(fitted, own, others, model, strict)
    return fitted


def _check_architecture(
    state: Mapping[str, Tensor], own: Mapping[str, Tensor], model: nn.Module, strict: bool
) -> None:
    """Raise ValueError where a sentence says more than a list of keys."""
    theirs, ours = architecture(state), architecture(own)
    if not theirs.is_vit or not ours.is_vit:
        return
    name = type(model).__name__
    if theirs.has_stem and not ours.has_stem:
        raise ValueError(
            f"the weights are those of an LV-ViT, whose stem of convolutions {name} does not have: build the "
            "model with evit_ext.models.lvvit_small, or the size that they are of"
        )
    if ours.has_stem and not theirs.has_stem:
        raise ValueError(
            f"{name} is an LV-ViT, and the weights, those of a {theirs.kind}, have no stem of convolutions: "
            "build the model with evit_ext.models.deit_small, or the size that they are of"
        )
    if theirs.is_distilled and not ours.is_distilled:
        raise ValueError(
            f"the weights are those of a distilled DeiT, whose distillation token and second head {name} "
            "does not have: build the model with evit_ext.models.deit_small_distilled(), or the size that "
            "they are of"
        )
    if ours.is_distilled and not theirs.is_distilled:
        raise ValueError(
            f"{name} is distilled, and the weights, those of a {theirs.kind}, have no distillation token and "
            "no second head: build the model without distillation"
        )
    if strict and theirs.has_predictors and not ours.has_predictors:
        raise ValueError(
            f"the weights are those of a DynamicViT, whose score predictors {name} does not have: "
            "strict=False loads all but those; evit_ext.models.dynamicvit_small builds a model that has them"
        )
    _check_size(state, own, name)


def _check_size(state: Mapping[str, Tensor], own: Mapping[str, Tensor], name: str) -> None:
    norm = "blocks.0.norm1.weight"
    if norm in state and norm in own and state[norm].dim() == own[norm].dim() == 1:
        theirs = (len(state[norm]), _depth(state))
        ours = (len(own[norm]), _depth(own))
        if theirs != ours:
            raise ValueError(
                f"the weights are those of another size: they have {theirs[0]} channels and {theirs[1]} "
                f"blocks, {name} has {ours[0]} and {ours[1]}"
            )
    for stem in ("patch_embed.conv1.weight", "patch_embed.proj.weight"):
        if stem in own and stem in state and state[stem].dim() == own[stem].dim() == 4:
            theirs_in, ours_in = state[stem].shape[1], own[stem].shape[1]
            if theirs_in != ours_in:
                raise ValueError(
                    f"the weights are for images of {theirs_in} channels, {name} is for {ours_in}: "
                    f"{stem} has shape {_shape(state[stem])}, the model's {_shape(own[stem])}"
                )
            return  # what LV-ViT's projection sees are its convolutions' channels


def _depth(state: Mapping[str, Tensor]) -> int:
    return len({key.split(".")[1] for key in state if key.startswith("blocks.")})


def _filter_like_timm(fitted: Fitted, model: nn.Module, resize: bool) -> None:
    """Bring other publications' keys into timm's, where timm knows how to.

    What its filter resizes on the way (kernels of the patch embedding; in models that are no
    VisionTransformer, position embeddings and tables too) it may resize only where that was asked for.
    """
    checkpoint_filter = _timms_filter(model)
    if checkpoint_filter is None:
        return
    before = dict(fitted.state)
    # timm would resize it its own way, asked or not; _fit_position_embedding does it.
    embedding = before.pop("pos_embed", None) if isinstance(model, VisionTransformer) else None
    options: dict[str, Any] = {}
    if "adapt_layer_scale" in inspect.signature(checkpoint_filter).parameters:
        options["adapt_layer_scale"] = True  # DeiT III's gamma_1, as timm calls it for DeiT
    try:
        after = dict(checkpoint_filter(dict(before), model, **options))
    except Exception as error:  # it takes for granted that the weights are of its kind
        raise ValueError(
            f"timm cannot make {type(model).__name__}'s weights of them ({type(error).__name__}: "
            f"{shortened(error)}); they begin with {_some(list(before), 3)}"
        ) from error
    for key, value in after.items():
        if key in before and value.numel() != before[key].numel():
            fitted.resized.append(key)
            if not resize:
                fitted.problems.append(
                    f"{key} has shape {_shape(before[key])}, the model's {_shape(value)}: "
                    "resize_pos_embed=True has timm resize it"
                )
    fitted.state = after if embedding is None else {**after, "pos_embed": embedding}


def _timms_filter(model: nn.Module) -> Callable[..., Mapping[str, Tensor]] | None:
    # timm hands it to its builder, from the module that the model's class is in.
    for cls in type(model).__mro__:
        found = getattr(sys.modules.get(cls.__module__), "checkpoint_filter_fn", None)
        if found is not None:
            return found
    return None


def _fit_position_embedding(fitted: Fitted, model: nn.Module, resize: bool | tuple[int, int]) -> None:
    own = getattr(model, "pos_embed", None)
    loaded = fitted.state.get("pos_embed")
    if not isinstance(model, VisionTransformer) or own is None:
        if isinstance(resize, tuple):
            raise ValueError(
                f"resize_pos_embed={resize} is for timm's VisionTransformer with a position embedding, not "
                f"for {type(model).__name__}: True leaves it to timm"
            )
        return
    if loaded is None or not loaded.is_floating_point():
        return  # _compare says it
    if loaded.dim() != 3 or loaded.shape[::2] != own.shape[::2]:
        return  # as well
    prefix = 0 if model.no_embed_class else model.num_prefix_tokens
    grid = (int(model.patch_embed.grid_size[0]), int(model.patch_embed.grid_size[1]))
    tokens, patches = loaded.shape[1], loaded.shape[1] - prefix
    others = f"{prefix} other{'' if prefix == 1 else 's'}"
    problem = ""
    if isinstance(resize, tuple):
        old_grid = resize
        if math.prod(resize) != patches:
            problem = (
                f", and resize_pos_embed={resize} says {resize[0]} × {resize[1]} patches; with {others} "
                f"these are {math.prod(resize) + prefix}"
            )
    elif tokens == own.shape[1]:
        return
    else:
        side = math.isqrt(max(patches, 0))
        old_grid = (side, side)
        is_square = side > 0 and side * side == patches
        if not resize:
            was = f" ({side} × {side} patches and {others})" if is_square else ""
            problem = (
                f"{was}, the model's {own.shape[1]} ({grid[0]} × {grid[1]} patches and {others}): "
                "resize_pos_embed=True resizes it"
            )
        elif not is_square:
            problem = (
                f", which are no square of patches and {others}: give their grid, "
                "resize_pos_embed=(height, width), or, where the weights have other tokens than the model "
                "(class, distillation, registers; no_embed_class), build the model as they are"
            )
    if problem:
        fitted.problems.append(f"pos_embed has {tokens} tokens{problem}")
        fitted.told.append("pos_embed")
        return
    if old_grid != grid:
        try:
            fitted.state["pos_embed"] = _resize(loaded, old_grid, grid, prefix, model)
        except RuntimeError as error:  # of a dtype that torch does not compute with
            raise ValueError(f"pos_embed in {loaded.dtype} cannot be resized: {shortened(error)}") from error
        fitted.resized.append("pos_embed")


def _resize(
    embedding: Tensor, old_grid: tuple[int, int], grid: tuple[int, int], prefix: int, model: nn.Module
) -> Tensor:
    if not isinstance(model, DeiT):
        resized = resample_abs_pos_embed(
            embedding, new_size=list(grid), old_size=list(old_grid), num_prefix_tokens=prefix
        )
        # Older timms give it back as it is where the new grid is a square of as many patches.
        if resized is not embedding:
            return resized
    return resize_position_embedding(embedding, old_grid, grid, prefix)


def _fit_heads(fitted: Fitted, own: Mapping[str, Tensor], model: nn.Module, resize: bool) -> None:
    """Leave out heads for other classes where that was asked for."""
    if getattr(model, "aux_head", model) is None:  # an LV-ViT with return_dense=False
        for key in [key for key in fitted.state if key.startswith("aux_head.")]:
            del fitted.state[key]
            fitted.unexpected.append(key)
    for name in _head_names(model):
        theirs = [key for key in fitted.state if key.startswith(f"{name}.")]
        ours = [key for key in own if key.startswith(f"{name}.")]
        if not theirs and not ours:
            continue
        if theirs and ours and fitted.state[theirs[0]].shape[:1] == own[ours[0]].shape[:1]:
            continue  # what else may not fit, _compare says
        if not resize:
            fitted.problems.append(
                f"{name}: {_classes(theirs, fitted.state)} in the file, {_classes(ours, own)} in the model; "
                f"resize_head=True {'keeps what the model has' if ours else 'leaves it out'}"
            )
        for key in theirs:
            del fitted.state[key]
        fitted.heads += ours
        fitted.unexpected += [key for key in theirs if not ours]


def _head_names(model: nn.Module) -> list[str]:
    """Return the names of the modules that classify."""
    if isinstance(model, VisionTransformer):
        return [name for name in _HEADS if isinstance(getattr(model, name, None), nn.Module)]
    get = getattr(model, "get_classifier", None)
    found = get() if callable(get) else ()
    heads = found if isinstance(found, (tuple, list)) else (found,)
    return [name for name, module in model.named_modules() if name and any(module is h for h in heads)]


def _classes(keys: list[str], state: Mapping[str, Tensor]) -> str:
    """Say what a head of these keys is for."""
    if not keys:
        return "none"
    shape = state[keys[0]].shape
    return f"for {shape[0] if shape else 1} classes"


def _compare(
    fitted: Fitted, own: Mapping[str, Tensor], others: Collection[str], model: nn.Module, strict: bool
) -> None:
    """Find what is missing, unexpected or of another shape; leave in the state what can be loaded."""
    heads = set(fitted.heads)
    missing = [key for key in own if key not in fitted.state and key not in heads]
    added = tuple(getattr(model, "ADDED", ()))
    if added and not any(key.startswith(added) for key in fitted.state):
        # A DynamicViT begins with a DeiT's weights; its predictors are not among them.
        required = [key for key in missing if not key.startswith(added)]
    else:
        required = missing
    unexpected = [key for key in fitted.state if key not in own]
    wrong = []
    for key in sorted(fitted.state.keys() & own.keys() - set(fitted.told)):
        theirs, ours = fitted.state[key], own[key]
        if theirs.shape != ours.shape:
            wrong.append(f"{key} {_shape(theirs)}, not {_shape(ours)}")
        elif _kind(theirs) != _kind(ours):
            wrong.append(f"{key} {theirs.dtype}, not {ours.dtype}")
    if wrong:
        fitted.problems.append(f"of another shape or type: {_some(wrong)}")
    if strict and required:
        fitted.problems.append(f"missing in the file: {_some(required)}")
    if strict and (unexpected or others):
        fitted.problems.append(f"not in the model: {_some([*unexpected, *others])}")
    for key in unexpected:
        del fitted.state[key]
    fitted.missing += missing
    fitted.unexpected += [*unexpected, *others]


def _kind(tensor: Tensor) -> tuple[bool, ...]:
    """What must be the same of two tensors, so that one becomes the other by rounding alone."""
    return tensor.is_floating_point(), tensor.is_complex(), tensor.dtype == torch.bool


def _shape(tensor: Tensor) -> str:
    return "×".join(map(str, tensor.shape)) or "()"


def _some(items: list[str], number: int = _SHOWN) -> str:
    """List the first of `items`."""
    more = f" and {len(items) - number} more" if len(items) > number else ""
    return ", ".join(shortened(item) for item in items[:number]) + more
