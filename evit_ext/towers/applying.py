"""Fewer tokens for a language model: selected where its vision tower ends, or inside the tower."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from torch import nn

from evit_ext._util.messages import shown
from evit_ext.patching import applying as patching
from evit_ext.tokens.rule import Rule
from evit_ext.towers import forwards
from evit_ext.towers.counting import counter_of
from evit_ext.towers.language_models import Located, locate_tower
from evit_ext.towers.placeholders import check_processor, restore_placeholders, write_placeholders

Model = TypeVar("Model", bound=nn.Module)


def apply(
    model: Model,
    keep_rate: float | Sequence[float] | None = None,
    fuse_token: bool | None = None,
    *,
    rule: Rule | Sequence[Rule] | None = None,
    mode: str = "select",
    drop_loc: Sequence[int] | None = None,
    processor: Any = None,
) -> Model:
    """Make the vision tower of a language model hand on fewer tokens of each image; in place.

    * Mode "select" needs no training: the tower computes all patches, and of the features that it hands on
      only those with the highest attention of the class token, in the layer that makes them, go to the
      projector. FasterVLM (arXiv 2412.01818) and VisionZip (arXiv 2412.04467) select by this attention.
    * Mode "inside" puts stages into the tower, as :func:`evit_ext.apply` does. The encoder becomes faster
      too; the paper's method is trained that way, and without training it loses more.

    Parameters and state-dict keys stay as they are. With keep rate 1 the model computes exactly what it did
    before. :func:`evit_ext.set_keep_rate` and :func:`evit_ext.record_tokens` take the whole model. The
    processor must write as many placeholders as there are tokens now: give it here, or to
    :func:`write_placeholders`.

    Args:
        model: a ``LlavaForConditionalGeneration``, ``LlavaNextForConditionalGeneration``,
            ``LlavaNextVideoForConditionalGeneration`` (for images),
            ``LlavaOnevisionForConditionalGeneration`` or ``PaliGemmaForConditionalGeneration`` of
            transformers, or the model inside it, with a tower that :func:`evit_ext.apply` supports. Videos
            need all patches. Towers without a class token (SigLIP) rank patches by the mean attention of
            all tokens.
        keep_rate: share of the patches to keep, in (0, 1]; 0.7 by default. 1/3 is 192 of 576.
        fuse_token: hand one more token on, the sum of the others weighted by their scores. By default so
            inside the tower, and not in mode "select": the projector never saw the like in its training.
        rule: any :class:`evit_ext.tokens.Rule` in the place of EViT's, as for :func:`evit_ext.apply`.
        mode: "select" or "inside".
        drop_loc: in mode "inside" only, numbers of the reorganising blocks; by default those at 1/4, 2/4 and
            3/4 of the depth that are not behind the layer that makes the features.
        processor: of the model; :func:`write_placeholders` is called with it.

    Returns:
        `model`.

    Raises:
        TypeError: an argument is of another type.
        ValueError: the model is not supported (the message says why: several models join whole groups of
            patches) or drops tokens already, `mode` is neither, `drop_loc` or another setting does not fit,
            or the processor is not that of the model. Model and processor are left as they were.

    Example:
        >>> llava = LlavaForConditionalGeneration.from_pretrained("llava-hf/llava-1.5-7b-hf")
        >>> processor = AutoProcessor.from_pretrained("llava-hf/llava-1.5-7b-hf")
        >>> evit_ext.towers.apply(llava, keep_rate=1 / 3, processor=processor)
    """
    if mode not in ("select", "inside"):
        raise ValueError(f"mode must be 'select' or 'inside', got {shown(mode)}")
    located = locate_tower(model)
    family = patching.supported(located.tower)
    if processor is not None:
        check_processor(processor, located)
    if mode == "select":
        if drop_loc is not None:
            raise ValueError(
                "drop_loc is for mode='inside': mode='select' selects in the layer that makes the features, "
                f"got {shown(drop_loc)}"
            )
        locations = [located.block]
        fuse_token = False if fuse_token is None and rule is None else fuse_token
    else:
        locations = _inside(located, drop_loc)
    rules = patching.check_rules(len(locations), keep_rate, fuse_token, rule)
    prefix = family.num_prefix_tokens(located.tower)
    patching.replace_blocks(located.tower, family, locations, rules, prefix, after_mlp=mode == "select")
    forwards.install(located)
    if processor is not None:
        write_placeholders(processor, model)
    return model


def _inside(located: Located, drop_loc: Sequence[int] | None) -> list[int]:
    blocks = located.family.find_blocks(located.tower)
    assert blocks is not None
    locations = patching.check_locations(len(blocks), drop_loc)
    if drop_loc is None:
        return [location for location in locations if location <= located.block] or [located.block]
    if locations[-1] > located.block:
        raise ValueError(
            f"drop_loc must not lie behind block {located.block}, whose output is the features that the "
            f"language model gets, got {tuple(locations)}"
        )
    return locations


def remove(model: Model, processor: Any = None) -> Model:
    """Undo :func:`apply`, with the parameters the model has now; in place.

    Args:
        model: a model that :func:`apply` changed.
        processor: its processor, which writes transformers' number of placeholders again.

    Returns:
        `model`.

    Raises:
        RuntimeError: as :func:`evit_ext.remove`, which does the same to the model.
    """
    patching.remove(model)
    if processor is not None:
        restore_placeholders(processor)
    return model


def num_image_tokens(model: nn.Module) -> int:
    """Return how many tokens of an image `model` hands to its language model, or of a tile of one.

    Of models that cut images into tiles, an image has as many for each tile, as many for the small image of
    the whole, and a token for a new line after each row of tiles.

    Raises:
        ValueError: the model is none that :func:`apply` supports.
    """
    located = locate_tower(model)
    return counter_of(located).tokens(located.num_patches)
