"""Where in a checkpoint the weights are, and what they are the weights of."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from evit_ext._util.messages import shown

#: How many dicts in dicts are looked into.
_DEEPEST = 8
_PLAIN = ("model", "state_dict", "model_state_dict")
_AVERAGED = ("model_ema", "state_dict_ema", "ema_state_dict", "ema")
# Of DistributedDataParallel, torch.compile, and modules that training frameworks put around a model.
_PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.")


class Architecture(NamedTuple):
    """What the state-dict keys tell of a model.

    Attributes:
        is_vit: it has the blocks and the patch embedding of timm's VisionTransformer.
        has_stem: LV-ViT's stem of convolutions.
        is_distilled: a distillation token.
        has_predictors: DynamicViT's predictors.
    """

    is_vit: bool
    has_stem: bool
    is_distilled: bool
    has_predictors: bool

    @property
    def kind(self) -> str:
        """What to call it."""
        if not self.is_vit:
            return "unknown"
        base = "LV-ViT" if self.has_stem else "distilled DeiT" if self.is_distilled else "ViT"
        if not self.has_predictors:
            return base
        return "DynamicViT" if base == "ViT" else f"DynamicViT ({base})"


def architecture(keys: Collection[str]) -> Architecture:
    """Return what state-dict keys tell."""
    return Architecture(
        is_vit="blocks.0.attn.qkv.weight" in keys and "patch_embed.proj.weight" in keys,
        has_stem="patch_embed.conv1.weight" in keys,
        is_distilled="dist_token" in keys,
        has_predictors=any(key.startswith("score_predictor.") for key in keys),
    )


@dataclass(frozen=True)
class Weights:
    """The weights that were chosen of a checkpoint.

    Attributes:
        state: them, under the keys of a bare model.
        others: keys among them that have no tensor.
        kind: what they are the weights of.
        entry: where they were in the file; "" for the file itself.
        is_ema: they are a moving average.
        unused: other entries that have weights of the model.
        epoch: that the file tells, if it does.
    """

    state: dict[str, Tensor]
    others: tuple[str, ...]
    kind: str
    entry: str
    is_ema: bool
    unused: tuple[str, ...]
    epoch: int | None


def find_weights(content: Any, use_ema: bool | None, own_keys: Collection[str], name: str) -> Weights:
    """Return the weights in what a file holds.

    Args:
        content: a state dict, or a dict that has it under one of the names that training scripts use.
        use_ema: take the moving average, the plain weights, or (None) the plain ones where there are any.
        own_keys: the model's, so that a prefix that it has itself is left where it is.
        name: what to call the file.

    Raises:
        ValueError: there are no weights, or not those that `use_ema` asks for.
    """
    if not isinstance(content, Mapping):
        raise ValueError(f"{name} holds a {type(content).__name__}, expected a dict of weights")
    state, is_ema = content, False
    path: list[str] = []
    unused: list[str] = []
    for _ in range(_DEEPEST):
        plain = [entry for entry in _PLAIN if _has_weights(state.get(entry))]
        averaged = [entry for entry in _AVERAGED if _has_weights(state.get(entry))]
        if not plain and not averaged:
            break
        take_ema = bool(averaged) and (use_ema is True or (use_ema is None and not plain))
        is_ema = is_ema or take_ema
        entry, *rest = averaged if take_ema else plain or averaged
        if not take_ema and not plain:
            raise ValueError(
                f"{name} has a moving average of the weights only, under {entry!r}: use_ema=False asks for "
                "others; leave it out, or give True"
            )
        unused += [".".join([*path, other]) for other in (*rest, *(plain if take_ema else averaged))]
        path.append(entry)
        state = state[entry]
    else:
        raise ValueError(f"{name} has dicts in dicts, more than {_DEEPEST} deep, and no weights")
    if not any(isinstance(value, Tensor) for value in state.values()):
        entries = ", ".join(map(shown, list(state)[:10])) or "nothing"
        raise ValueError(
            f"found no weights in {name}: it has {entries}; expected a state dict, or one under "
            f"{', '.join(map(repr, _PLAIN + _AVERAGED))}. Read it with torch.load, and save the state dict "
            "that is in it alone"
        )
    if use_ema and not is_ema:
        raise ValueError(
            f"{name} has no moving average of the weights, which use_ema=True asks for: looked for "
            f"{', '.join(map(repr, _AVERAGED))}"
        )
    tensors = {str(key): value for key, value in state.items() if isinstance(value, Tensor)}
    others = tuple(str(key) for key, value in state.items() if not isinstance(value, Tensor))
    tensors = _without_prefixes(tensors, own_keys)
    epoch = content.get("epoch")
    return Weights(
        state=tensors,
        # What a bare state dict was saved next to is not taken for weights.
        others=others if path else tuple(key for key in others if "." in key),
        kind=_kind(architecture(tensors), content.get("args")),
        entry=".".join(path),
        is_ema=is_ema,
        unused=tuple(unused),
        epoch=epoch if isinstance(epoch, int) and not isinstance(epoch, bool) else None,
    )


def _has_weights(value: Any, seen: set[int] | None = None) -> bool:
    # Each dict is looked at once: a file may hold one in many places, or in itself.
    seen = set() if seen is None else seen
    if not isinstance(value, Mapping) or id(value) in seen or len(seen) > 100:
        return False
    seen.add(id(value))
    if any(isinstance(v, Tensor) for v in value.values()):
        return True
    return any(_has_weights(value.get(entry), seen) for entry in _PLAIN + _AVERAGED)


def _without_prefixes(state: dict[str, Tensor], own_keys: Collection[str]) -> dict[str, Tensor]:
    """Return `state` without what wrappers have put before every key."""
    changed = bool(state)
    while changed:
        changed = False
        for prefix in _PREFIXES:
            theirs = all(key.startswith(prefix) for key in state)
            if theirs and not any(key.startswith(prefix) for key in own_keys):
                state = {key.removeprefix(prefix): value for key, value in state.items()}
                changed = True
    return state


def _kind(of_keys: Architecture, arguments: Any) -> str:
    # An EViT has a ViT's keys: only the arguments of its training, saved next to them, tell.
    if of_keys.kind == "ViT" and isinstance(getattr(arguments, "base_keep_rate", None), (int, float)):
        return "EViT"
    return of_keys.kind
