"""How many tokens of an image are left, from settings and sizes alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from evit_ext.tokens.rule import Rule
from evit_ext.tokens.stage import find_stages
from evit_ext.towers.language_models import Located


@dataclass(frozen=True)
class Counter:
    """Counts the tokens of images; it can be copied to other processes without the model.

    Attributes:
        rules: of the stages, in order.
        extra: tokens of an image besides its patches, such as a class token.
    """

    rules: tuple[Rule, ...]
    extra: int = 0

    def keeps_all(self, num_patches: int) -> bool:
        """Return whether every patch token goes on as it is."""
        left = num_patches
        for rule in self.rules:
            if rule.num_kept(left, None) != left:
                return False
            left = rule.num_out(left, None)
        return True

    def patch_tokens(self, num_patches: int) -> int:
        """Return how many patch tokens are left of those of an image, or a tile; fused ones count."""
        for rule in self.rules:
            num_patches = rule.num_out(num_patches, None)
        return num_patches

    def tokens(self, num_patches: int) -> int:
        """Return how many tokens an image without tiles has for the language model."""
        return self.patch_tokens(num_patches) + self.extra

    def tiled(self, num_patches: int, tiles: tuple[int, int]) -> int:
        """Return how many tokens an image has that is cut into tiles; see :class:`PackTiles`.

        Args:
            num_patches: of a tile.
            tiles: rows and columns of tiles, besides the small image of the whole.
        """
        rows, columns = tiles
        return self.patch_tokens(num_patches) * (1 + rows * columns) + rows


def counter_of(located: Located) -> Counter:
    """Return what counts the tokens of a model's images, by the rules that it has now."""
    return Counter(tuple(stage.rule for stage in find_stages(located.tower)), located.extra)


def tiles_of(image_size: Any, pinpoints: Sequence[Sequence[int]], side: int) -> tuple[int, int]:
    """Return the rows and columns of tiles that transformers cuts an image into.

    Args:
        image_size: height and width in pixels.
        pinpoints: the sizes that it may be brought to (``image_grid_pinpoints``).
        side: of a tile, in pixels.
    """
    from transformers.image_processing_utils import select_best_resolution

    size = image_size.tolist() if hasattr(image_size, "tolist") else image_size
    height, width = select_best_resolution(tuple(size), list(pinpoints))
    return height // side, width // side
