"""The placeholders that a processor writes for the tokens of images.

transformers' language models put the tokens of an image where the text has placeholders, of which there must
be exactly as many. Their processors count patches; those here count the tokens that are left of them.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from evit_ext._util.overriding import Override, overrides, remove_overrides
from evit_ext.tokens.stage import stages_of
from evit_ext.towers.counting import Counter, counter_of, tiles_of
from evit_ext.towers.language_models import Located, locate_tower


class _Placeholders(Override):
    """Shared by both: a method of a processor that counts the tokens of images.

    Args:
        processor: whose method is overridden.
        name: of the method.
        counter: what counts.
        num_patches: of an image or tile.
        tiles: the processor cuts images into tiles.
        side: of an image or tile, in pixels.
    """

    def __init__(
        self, processor: Any, name: str, counter: Counter, num_patches: int, tiles: bool, side: int
    ) -> None:
        super().__init__(processor, name)
        self.counter = counter
        self.num_patches = num_patches
        self.tiles = tiles
        self.side = side

    def __deepcopy__(self, memo: dict[int, Any]) -> _Placeholders:
        # A copied processor gets its own. transformers also copies all attributes of a processor alone, to
        # save some of them, and that must not copy the processor, with its tokenizer, again.
        processor = memo.get(id(self.module), self.module)
        copied = type(self)(processor, self.name, self.counter, self.num_patches, self.tiles, self.side)
        copied.replaced = self.replaced
        return copied

    def count(self, image_size: Any, alone: bool = True) -> int:
        """Return how many tokens an image of (height, width) has; `alone` it is cut into tiles."""
        if not self.tiles:
            return self.counter.tokens(self.num_patches)
        if not alone:
            return self.counter.tokens(self.num_patches) + 1  # for a new line
        processor: Any = self.module
        pinpoints = processor.image_processor.image_grid_pinpoints
        return self.counter.tiled(self.num_patches, tiles_of(image_size, pinpoints, self.side))


class WritePlaceholders(_Placeholders):
    """Overrides ``replace_image_token`` of a processor, which writes the placeholders of an image."""

    def __call__(self, *arguments: Any, **others: Any) -> str:
        """Return the placeholders of image number ``image_idx``; see transformers'."""
        if self.counter.keeps_all(self.num_patches):
            written: str = self.original()(*arguments, **others)
            return written
        processor: Any = self.module
        named = self.named(*arguments, **others)
        image_inputs, image_idx = named["image_inputs"], named.get("image_idx", 0)
        size = image_inputs["image_sizes"][image_idx] if self.tiles else None
        text: str = processor.image_token * self.count(size, _is_alone(image_inputs, image_idx))
        return text


class CountPlaceholders(_Placeholders):
    """Overrides ``_get_num_multimodal_tokens``, by which serving engines know the number of placeholders."""

    def __call__(self, *arguments: Any, **others: Any) -> Any:
        """Return transformers' counts, with those of images of (height, width) replaced."""
        counts = self.original()(*arguments, **others)
        image_sizes = self.named(*arguments, **others).get("image_sizes")
        if image_sizes is not None and not self.counter.keeps_all(self.num_patches):
            counts.num_image_tokens = [self.count(size) for size in image_sizes]
        return counts


def _is_alone(image_inputs: Any, image_idx: int) -> bool:
    """Return whether an image is cut into tiles: one of several in a sample is not, where it is said."""
    if "batch_num_images" not in image_inputs:
        return True
    first = 0
    for number in map(int, image_inputs["batch_num_images"]):
        if image_idx < first + number:
            return number == 1
        first += number
    raise IndexError(f"there is no image {image_idx} among {first}")


def write_placeholders(processor: Any, model: nn.Module) -> Any:
    """Have a processor write as many placeholders as `model` makes tokens of an image; in place.

    The processor does not hold on to the model: it can be copied to other processes. After
    :func:`evit_ext.set_keep_rate`, call this again; a text that was processed before is refused by the model.
    A processor that is saved and loaded again writes transformers' numbers.

    Args:
        processor: of the model's kind, such as a ``LlavaProcessor``.
        model: a model that :func:`evit_ext.towers.apply` changed.

    Returns:
        `processor`.

    Raises:
        TypeError: `processor` is none of the model's kind.
        ValueError: `model` drops no tokens, is not supported, or the processor is set up for another model
            (another patch size, image size, placeholder or list of resolutions).
    """
    located = locate_tower(model)
    stages_of(located.tower)
    check_processor(processor, located)
    restore_placeholders(processor)
    settings = (counter_of(located), located.num_patches, located.kind.tiles, _side(located))
    WritePlaceholders(processor, "replace_image_token", *settings).install()
    CountPlaceholders(processor, "_get_num_multimodal_tokens", *settings).install()
    return processor


def restore_placeholders(processor: Any) -> Any:
    """Undo :func:`write_placeholders`: transformers' numbers of placeholders again; in place.

    Returns:
        `processor`.
    """
    remove_overrides(processor)
    return processor


def check_placeholders(processor: Any, model: nn.Module) -> None:
    """Raise ValueError unless a processor writes as many placeholders as `model` makes tokens.

    Args:
        processor: of the model's kind.
        model: as for :func:`write_placeholders`; it may drop tokens or not.

    Raises:
        TypeError, ValueError: as :func:`write_placeholders`; or the numbers differ.
    """
    located = locate_tower(model)
    check_processor(processor, located)
    counter, patches = counter_of(located), located.num_patches
    writers = [override for override in overrides(processor) if isinstance(override, _Placeholders)]
    written = writers[0].counter if writers else Counter((), located.extra)
    if written.tokens(patches) != counter.tokens(patches) or written.keeps_all(patches) != counter.keeps_all(
        patches
    ):
        raise ValueError(
            f"of {patches} patches, the processor counts {written.tokens(patches)} tokens, and the model "
            f"makes {counter.tokens(patches)}: call evit_ext.towers.write_placeholders(processor, model), or"
            " restore_placeholders(processor) if the model drops no tokens any more"
        )


def _side(located: Located) -> int:
    return int(located.module.config.vision_config.image_size)


def check_processor(processor: Any, located: Located) -> None:
    """Raise TypeError or ValueError unless a processor is one for the model."""
    expected = located.kind.processor
    if not any(cls.__name__ == expected for cls in type(processor).__mro__):
        raise TypeError(f"processor must be the model's, a {expected}, got {type(processor).__name__}")
    config, images = located.module.config, processor.image_processor
    pairs: list[tuple[str, Any, Any]] = [
        ("image_token_id", processor.image_token_id, config.image_token_id),
    ]
    rows, columns = located.grid
    if hasattr(processor, "patch_size"):
        pairs.append(("patch_size", processor.patch_size, config.vision_config.patch_size))
    if hasattr(processor, "vision_feature_select_strategy"):
        strategy = "vision_feature_select_strategy"
        pairs.append((strategy, getattr(processor, strategy), getattr(config, strategy)))
    for name in ("image_seq_length", "num_image_tokens"):
        if hasattr(processor, name):
            pairs.append((name, getattr(processor, name), rows * columns))
    if located.kind.tiles:
        pinpoints = [list(size) for size in images.image_grid_pinpoints]
        pairs.append(
            ("image_grid_pinpoints", pinpoints, [list(size) for size in config.image_grid_pinpoints])
        )
    for name, own, of_model in pairs:
        if own != of_model:
            raise ValueError(
                f"the processor is for another model: its {name} is {own}, and that of the model {of_model}"
            )
