"""What a language model does otherwise once its images have fewer tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from evit_ext._util.overriding import Override
from evit_ext.towers.counting import counter_of, tiles_of
from evit_ext.towers.language_models import Located, locate_tower


class CheckPlaceholders(Override):
    """Overrides ``get_placeholder_mask``: wrong numbers of placeholders get a sentence that helps.

    Raises:
        ValueError: the text has not as many placeholders as there are tokens of images.
    """

    def __call__(self, *arguments: Any, **others: Any) -> Any:
        """Return the mask of the placeholders; see transformers'."""
        # A graph has no numbers to compare; transformers' own check is part of it.
        if not torch.compiler.is_compiling():
            named = self.named(*arguments, **others)
            self._check(named.get("input_ids"), named.get("image_features"))
        return self.original()(*arguments, **others)

    def _check(self, input_ids: Tensor | None, image_features: Tensor | None) -> None:
        if input_ids is None or image_features is None:
            return
        located = locate_tower(self.module)
        written = int((input_ids == located.module.config.image_token_id).sum())
        made = image_features.numel() // image_features.shape[-1]
        if written != made:
            raise ValueError(_mismatch(located, written, made))


def _mismatch(located: Located, written: int, made: int) -> str:
    left = counter_of(located).tokens(located.num_patches)
    each = "tile of an image" if located.kind.tiles else "image"
    return (
        f"the text has {written} placeholders for tokens of images, and the vision tower made {made} tokens "
        f"(of {located.num_patches} patches, {left} are left for each {each}): have the processor write as "
        "many by evit_ext.towers.write_placeholders(processor, model), again after each change of the keep "
        "rate, and process text and images anew"
    )


class PackTiles(Override):
    """Overrides ``pack_image_features``, which puts the tiles of an image next to each other as one grid.

    Tokens that are left form no grid. They go to the language model tile by tile instead: those of the small
    image of the whole, then those of the tiles, row by row, with the token for a new line after each row of
    tiles. Nothing is cut off where an image was padded, as the number of tokens would then depend on more
    than the number of tiles: padding competes as all other patches do. While all patches are kept,
    transformers' own method runs.
    """

    def __call__(self, *arguments: Any, **others: Any) -> tuple[list[Tensor], Tensor]:
        """Return the tokens of each image [L, C], and L of each; see transformers'.

        Args:
            arguments: of transformers' method, by place or by name. ``image_features`` are, for each image,
                [1 + tiles, M, C], or [1, M, C] if it has no tiles; ``image_sizes`` height and width of each
                image in pixels; ``image_newline``, if there is one, is the token for a new line, [C].
            others: as well.
        """
        located = locate_tower(self.module)
        counter, config = counter_of(located), located.module.config
        if counter.keeps_all(located.num_patches):
            packed: tuple[list[Tensor], Tensor] = self.original()(*arguments, **others)
            return packed
        named = self.named(*arguments, **others)
        image_features, image_sizes = named["image_features"], named["image_sizes"]
        image_newline = named.get("image_newline")
        images = []
        for features, size in zip(image_features, image_sizes, strict=True):
            whole, tiles = features[0], features[1:]
            newline = None if image_newline is None else image_newline.to(features).expand(1, -1)
            rows = [whole]
            if len(tiles):
                side = config.vision_config.image_size
                num_rows, num_columns = tiles_of(size, config.image_grid_pinpoints, side)
                in_rows = tiles.reshape(num_rows, num_columns * tiles.shape[1], -1)
                rows += [part for row in in_rows for part in (row, newline) if part is not None]
            elif newline is not None:
                rows.append(newline)
            images.append(torch.cat(rows))
        lengths = torch.tensor([len(image) for image in images], device=images[0].device)
        return images, lengths


class RefuseVideos(Override):
    """Overrides ``get_video_features``, which averages neighbouring patches.

    Raises:
        ValueError: the tower drops patches.
    """

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """Return the features of videos; see transformers'."""
        located = locate_tower(self.module)
        if not counter_of(located).keeps_all(located.num_patches):
            raise ValueError(
                "videos are not supported while patches are dropped, as pooling their frames needs the whole "
                "grid: set the keep rate to 1, or call evit_ext.towers.remove"
            )
        return self.original()(*arguments, **named)


def install(located: Located) -> None:
    """Override the methods of a language model; ``evit_ext.remove`` undoes it."""
    module = located.module
    CheckPlaceholders(module, "get_placeholder_mask").install()
    if located.kind.tiles:
        PackTiles(module, "pack_image_features").install()
    if hasattr(module, "get_video_features"):
        RefuseVideos(module, "get_video_features").install()
