"""Which of transformers' language models have a vision tower whose tokens may be fewer, and which not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from evit_ext.patching.families import Family, family_of, locate


@dataclass(frozen=True)
class Kind:
    """A class of models whose projector works token by token, so that any number of tokens may reach it.

    Attributes:
        processor: the class of its processor.
        tiles: it cuts images of any resolution into tiles, and packs the features of these.
        takes_last: its features are the tower's last output; else those of the layer that the configuration
            names (``vision_feature_layer``).
    """

    processor: str
    tiles: bool = False
    takes_last: bool = False


KINDS = {
    "LlavaModel": Kind("LlavaProcessor"),
    "LlavaNextModel": Kind("LlavaNextProcessor", tiles=True),
    "LlavaNextVideoModel": Kind("LlavaNextVideoProcessor", tiles=True),
    "LlavaOnevisionModel": Kind("LlavaOnevisionProcessor", tiles=True),
    "PaliGemmaModel": Kind("PaliGemmaProcessor", takes_last=True),
}

_SHUFFLE = "its pixel shuffle joins neighbouring patches into one token, and needs whole groups of them"
_MERGER = "its merger joins neighbouring patches into one token, and needs whole groups of them"
_POOLING = "its pooling averages neighbouring patches, and needs the whole grid"
_RESAMPLER = "its language model gets a fixed number of queries, however many patches there are"
_LAYERS = "it joins the features of several layers, which must all have the same tokens"

#: Why others are refused, by the class that holds the tower.
REASONS = {
    "AyaVisionModel": _SHUFFLE,
    "Blip2Model": _RESAMPLER,
    "Cohere2VisionModel": _SHUFFLE,
    "Gemma3Model": _POOLING,
    "Glm4vModel": _MERGER,
    "Idefics2Model": _RESAMPLER,
    "Idefics3Model": _SHUFFLE,
    "InstructBlipModel": _RESAMPLER,
    "InternVLModel": _SHUFFLE,
    "Llama4ForConditionalGeneration": _SHUFFLE,
    "Mistral3Model": _MERGER,
    "Qwen2VLModel": _MERGER,
    "Qwen2_5_VLModel": _MERGER,
    "Qwen3VLModel": _MERGER,
    "SmolVLMModel": _SHUFFLE,
    "VipLlavaModel": _LAYERS,
}


class Located(NamedTuple):
    """Where the tower of a language model is, and which of its tokens are features.

    Attributes:
        kind: of the model.
        module: the module that holds tower and projector, such as a ``LlavaModel``.
        family: of the tower.
        tower: the module that holds the tower's layers.
        block: the number of the block whose output is the features.
        extra: tokens of an image besides its patches that reach the language model: class token, registers.
        grid: rows and columns of the patches of an image, or a tile of one.
    """

    kind: Kind
    module: Any
    family: Family
    tower: Any
    block: int
    extra: int
    grid: tuple[int, int]

    @property
    def num_patches(self) -> int:
        """How many patches an image, or a tile of one, has."""
        return self.grid[0] * self.grid[1]


def _named(module: nn.Module, names: Any) -> str | None:
    """Return which of transformers' classes of these names `module` is an instance of."""
    for cls in type(module).__mro__:
        if cls.__name__ in names and cls.__module__.startswith("transformers."):
            return cls.__name__
    return None


def locate_tower(model: nn.Module) -> Located:
    """Return where the vision tower of a language model of transformers is, whatever wraps it.

    Raises:
        TypeError: `model` is no module.
        ValueError: it is none of those that are supported; the message says why.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            "model must be a language model of transformers with a vision tower, a torch module, got "
            f"{type(model).__name__}"
        )
    for module in model.modules():
        if reason := REASONS.get(_named(module, REASONS) or ""):
            raise ValueError(f"{type(model).__name__} is not supported: {reason}")
        if name := _named(module, KINDS):
            return _located(KINDS[name], module)
    hint = ""
    if locate(model) is not None:
        hint = "; a vision transformer by itself is evit_ext.apply's"
    raise ValueError(
        f"{type(model).__name__} is not supported: of transformers' language models with a vision tower, "
        f"evit_ext knows those whose projector works token by token, and of these {', '.join(KINDS)}{hint}"
    )


def _located(kind: Kind, module: Any) -> Located:
    name, config = type(module).__name__, module.config
    found = locate(module.vision_tower)
    family = family_of(module.vision_tower) if found is None else found.family  # which raises
    tower = family.vision_tower(module.vision_tower)
    blocks = family.find_blocks(tower)
    assert blocks is not None
    prefix = family.num_prefix_tokens(tower)
    layer, extra = len(blocks), prefix
    if not kind.takes_last:
        layer = _feature_layer(name, config.vision_feature_layer, len(blocks))
        strategy = config.vision_feature_select_strategy
        if strategy not in ("default", "full"):
            raise ValueError(f"vision_feature_select_strategy must be 'default' or 'full', got {strategy!r}")
        if strategy == "default":
            if prefix == 0:
                raise ValueError(
                    f"{name} leaves out the first token of the features (vision_feature_select_strategy="
                    "'default'), which is a patch, as its tower has no class token: set it to 'full'"
                )
            extra -= 1
    if kind.tiles and extra:
        raise ValueError(
            f"the features of {name} would have {extra} tokens besides the patches in each tile (vision_"
            "feature_select_strategy='full'), which it does not tell from patches: set it to 'default'"
        )
    side = int(config.vision_config.image_size)
    return Located(kind, module, family, tower, layer - 1, extra, family.patch_grid(tower, (side, side)))


def _feature_layer(name: str, layer: Any, depth: int) -> int:
    """Return how many blocks make the features of `layer`, as a number from 1."""
    if isinstance(layer, (list, tuple)):
        if len(layer) != 1:
            raise ValueError(f"{name} is not supported with vision_feature_layer={list(layer)}: {_LAYERS}")
        layer = layer[0]
    number = layer + depth + 1 if layer < 0 else layer
    if not 1 <= number <= depth:
        raise ValueError(
            f"vision_feature_layer must be the output of one of the tower's {depth} blocks, 1 … {depth} or "
            f"-{depth} … -1, got {layer}"
        )
    return int(number)
