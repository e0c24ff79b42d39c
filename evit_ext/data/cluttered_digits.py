"""`cluttered-digits`: one whole handwritten digit among pieces of other digits, generated from a seed.

The task that token reorganisation is made for, small enough for a laptop: most of the canvas is background or
clutter, and the object's exact place is known, so that "does the network keep the object's patches?" has a
numeric answer. Modelled on "Cluttered MNIST" (Mnih et al., "Recurrent Models of Visual Attention", 2014,
arXiv 1406.6247), with scikit-learn's scans instead of MNIST.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Dataset

from evit_ext._util.messages import shown
from evit_ext.data.digits import (
    INK_MAX,
    SCAN_SIZE,
    SPLITS,
    WEIGHT_ONE,
    ByteArray,
    FloatArray,
    IntArray,
    check_split,
    interpolation_weights,
    load_scans,
    normalize,
)

# Brightness is a multiple of 1 / BRIGHTNESS_ONE. A drawn digit then stays below
# INK_MAX * WEIGHT_ONE**2 * BRIGHTNESS_ONE = 2**20, and MAX_DISTRACTORS of them on one pixel reach 2**24:
# float32 represents all these integers exactly.
BRIGHTNESS_ONE = 16
MAX_DISTRACTORS = 16
_FULL = INK_MAX * WEIGHT_ONE**2 * BRIGHTNESS_ONE


@dataclass(frozen=True)
class Difficulty:
    """What a canvas looks like. Ranges are inclusive; sizes are fractions of the canvas's side.

    Attributes:
        digit_size: side of the digit's box.
        digit_brightness: 1 is white.
        num_distractors: number of pieces of other digits, at most 16.
        distractor_size: side of the whole digit that a distractor is a piece of.
        distractor_brightness: as `digit_brightness`.
        piece: side of a piece in pixels of the 8x8 scan.

    Raises:
        ValueError: a range is empty or outside its limits.
    """

    digit_size: tuple[float, float] = (0.375, 0.5)
    digit_brightness: tuple[float, float] = (0.75, 1.0)
    num_distractors: tuple[int, int] = (6, 6)
    distractor_size: tuple[float, float] = (0.375, 0.5)
    distractor_brightness: tuple[float, float] = (0.25, 0.5)
    piece: tuple[int, int] = (3, 4)

    def __post_init__(self) -> None:
        limits = {
            "digit_size": (0, 1),
            "digit_brightness": (0, 1),
            "num_distractors": (0, MAX_DISTRACTORS),
            "distractor_size": (0, 1),
            "distractor_brightness": (0, 1),
            "piece": (1, SCAN_SIZE),
        }
        for name, (least, most) in limits.items():
            low, high = getattr(self, name)
            if not least <= low <= high <= most:
                raise ValueError(
                    f"{name} must be a range (low, high) within [{least}, {most}], got {(low, high)}"
                )


#: `easy`: six faint pieces. `hard`: ten pieces as bright as the digit, which varies more in size.
DIFFICULTIES = {
    "easy": Difficulty(),
    "hard": Difficulty(
        digit_size=(0.3, 0.5),
        digit_brightness=(0.5, 1.0),
        num_distractors=(10, 10),
        distractor_size=(0.3, 0.5),
        distractor_brightness=(0.5, 1.0),
        piece=(3, 5),
    ),
}


class CanvasBatch(NamedTuple):
    """A batch: `images` float32 [B, 3, S, S], normalized, `labels` int64 [B], and the digits' ink, `masks`,
    bool [B, S, S]."""

    images: torch.Tensor
    labels: torch.Tensor
    masks: torch.Tensor


class _Random:
    """Random numbers of item i, property j, as a pure function of the keys: SplitMix64 used as a hash.

    Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014. With a stateful
    generator, an image would depend on those drawn before it, and so on batch size and number of workers.
    """

    def __init__(self, keys: Sequence[int], index: IntArray) -> None:
        state = np.zeros_like(index, dtype=np.uint64)
        for key in keys:
            state = self._mix(state ^ np.uint64(key % 2**64))
        self._state = self._mix(state ^ index.astype(np.uint64))
        self._drawn = 0

    @staticmethod
    def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))

    def integers(self, low: npt.ArrayLike, high: npt.ArrayLike, count: int) -> IntArray:
        """Uniform in [low, high], both inclusive and broadcast: int64 [items, count]."""
        slot = np.arange(self._drawn, self._drawn + count, dtype=np.uint64)
        self._drawn += count
        bits = self._mix(self._state[:, None] ^ (slot * np.uint64(0xD1342543DE82EF95))) >> np.uint64(40)
        low = np.asarray(low, dtype=np.int64)
        span = np.asarray(high, dtype=np.int64) - low + 1
        return low + ((bits.astype(np.int64) * span) >> 24)


class ClutteredDigits(Dataset[tuple[torch.Tensor, int]]):
    """A handwritten digit at a random place, size and brightness among pieces of other digits.

    Item i of (seed, split, epoch) is always the same image, bit for bit, whatever the batch size, the number
    of workers or the order of access. Digits and distractors of a split come only from its own scans.

    Args:
        split: "train" or "test".
        canvas_size: side of the canvas in pixels; the smallest digit must be at least 8 pixels wide.
        size: number of items; by default ten times the number of scans. Item i shows scan i modulo that
            number.
        seed: any int, taken modulo 2**64.
        epoch: a further key that gives every epoch new canvases; see `set_epoch`.
        difficulty: "easy", "hard", or a `Difficulty`.

    Items are `(image, label)`: float32 [3, S, S], normalized, and an int from 0 to 9. `render` makes a whole
    batch at once, with masks of the digits, and is much faster.

    Raises:
        ValueError: unknown split or difficulty, canvas too small, or size below 1.
        ModuleNotFoundError: scikit-learn is not installed.
    """

    num_classes = 10

    def __init__(
        self,
        split: str = "train",
        canvas_size: int = 64,
        size: int | None = None,
        seed: int = 0,
        epoch: int = 0,
        difficulty: str | Difficulty = "easy",
    ) -> None:
        check_split(split)
        if isinstance(difficulty, str):
            if difficulty not in DIFFICULTIES:
                known = ", ".join(map(repr, DIFFICULTIES))
                raise ValueError(
                    f"difficulty must be a Difficulty or one of {known}, got {shown(difficulty)}"
                )
            difficulty = DIFFICULTIES[difficulty]
        smallest = round(difficulty.digit_size[0] * canvas_size)
        if smallest < SCAN_SIZE:
            raise ValueError(
                f"canvas_size {canvas_size} is too small: its smallest digit would have {smallest} pixels, "
                f"fewer than the {SCAN_SIZE} of a scan"
            )
        self.scans, self.labels = load_scans(split)
        if size is None:
            size = 10 * len(self.labels)
        if size < 1:
            raise ValueError(f"size must be at least 1, got {size}")
        self.split = split
        self.canvas_size = canvas_size
        self.size = size
        self.seed = seed
        self.epoch = epoch
        self.difficulty = difficulty

    def set_epoch(self, epoch: int) -> None:
        """Switch to the canvases of another epoch; running DataLoader workers do not notice."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        batch = self.render([index])
        return batch.images[0], int(batch.labels[0])

    def mask(self, index: int) -> torch.Tensor:
        """The digit's ink in item `index`, bool [S, S]."""
        return self.render([index]).masks[0]

    def object_patches(self, index: int, patch_size: int) -> torch.Tensor:
        """The patches of item `index` that show the digit, bool [(S / patch_size)²]; see `object_patches`."""
        return object_patches(self.render([index]).masks, patch_size)[0]

    def render(self, indices: Sequence[int] | IntArray | torch.Tensor) -> CanvasBatch:
        """The items of `indices`, int [B], as one batch (B may be 0).

        Raises:
            IndexError: an index is outside [-size, size).
        """
        index = np.asarray(indices, dtype=np.int64).reshape(-1)
        if len(index) and not (-self.size <= index.min() and index.max() < self.size):
            raise IndexError(f"indices {index.min()} to {index.max()} are out of range for {self.size} items")
        index = index % self.size
        canvas, masks = self._draw(index)
        labels = torch.from_numpy(self.labels[index % len(self.labels)])
        return CanvasBatch(normalize(canvas), labels, torch.from_numpy(masks))

    def batches(
        self, batch_size: int, shuffle: bool = False, drop_last: bool = False, workers: int = 0
    ) -> Iterator[CanvasBatch]:
        """All items of this epoch, `batch_size` at a time; seed and epoch determine the shuffled order.

        `workers` are processes that draw them in advance; the images are the same.

        Raises:
            ValueError: `batch_size` is below 1, or `workers` below 0.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if workers < 0:
            raise ValueError(f"workers must be at least 0, got {workers}")
        order = np.arange(self.size)
        if shuffle:
            order = np.random.default_rng([self.seed % 2**63, self.epoch]).permutation(self.size)
        end = self.size - self.size % batch_size if drop_last else self.size
        parts = [order[start : start + batch_size] for start in range(0, end, batch_size)]
        if workers == 0:
            return map(self.render, parts)
        own = torch.Generator()  # or it would draw a number of the global one
        listed: Any = parts  # a list is data set enough
        loader = DataLoader(
            listed, batch_size=None, collate_fn=self.render, num_workers=workers, generator=own
        )
        return iter(loader)

    def with_difficulty(self, difficulty: Difficulty) -> ClutteredDigits:
        """The same items at another difficulty, for a curriculum."""
        return ClutteredDigits(self.split, self.canvas_size, self.size, self.seed, self.epoch, difficulty)

    def _draw(self, index: IntArray) -> tuple[ByteArray, npt.NDArray[np.bool_]]:
        """uint8 canvases and bool masks, both [B, S, S]."""
        d, side = self.difficulty, self.canvas_size
        random = _Random((self.seed, SPLITS.index(self.split), self.epoch), index)

        def pixels(fractions: tuple[float, float]) -> tuple[int, int]:
            return max(SCAN_SIZE, round(fractions[0] * side)), max(SCAN_SIZE, round(fractions[1] * side))

        def levels(fractions: tuple[float, float]) -> tuple[int, int]:
            return round(fractions[0] * BRIGHTNESS_ONE), round(fractions[1] * BRIGHTNESS_ONE)

        # The digit. One column per property; the order of the draws is part of the data set's definition.
        extent = random.integers(*pixels(d.digit_size), 1)
        top = random.integers(0, side - extent, 1)
        left = random.integers(0, side - extent, 1)
        digit_brightness = random.integers(*levels(d.digit_brightness), 1)
        ink = self.scans[index % len(self.scans)][:, None]
        zero = np.zeros_like(extent)
        digit = _paste(ink * _column(digit_brightness), side, top, left, extent, zero, zero)

        # The distractors. The maximum number is always drawn, with the surplus ones black, so that a
        # distractor's properties do not depend on how many there are.
        n = d.num_distractors[1]
        number = random.integers(*d.num_distractors, 1)
        chosen = random.integers(0, len(self.scans) - 1, n)
        extent = random.integers(*pixels(d.distractor_size), n)
        piece = random.integers(*d.piece, n)
        row = random.integers(0, SCAN_SIZE - piece, n)
        column = random.integers(0, SCAN_SIZE - piece, n)
        drawn = piece * extent // SCAN_SIZE
        # Up to half of a piece may lie outside the canvas.
        top = random.integers(-(drawn // 2), side - drawn + drawn // 2, n)
        left = random.integers(-(drawn // 2), side - drawn + drawn // 2, n)
        brightness = random.integers(*levels(d.distractor_brightness), n)
        brightness = np.where(np.arange(n) < number, brightness, 0)
        scan_pixel = np.arange(SCAN_SIZE)
        in_row = (scan_pixel >= row[..., None]) & (scan_pixel < (row + piece)[..., None])
        in_column = (scan_pixel >= column[..., None]) & (scan_pixel < (column + piece)[..., None])
        cut = self.scans[chosen] * (in_row[..., :, None] & in_column[..., None, :])
        clutter = _paste(cut * _column(brightness), side, top, left, extent, row, column)

        # The digit is drawn over the clutter; its mask has all pixels from a quarter of its brightness on.
        canvas = np.minimum(np.maximum(digit, clutter), np.float32(_FULL))
        full = _column(digit_brightness)[:, 0] * np.float32(INK_MAX * WEIGHT_ONE**2)
        mask = (4 * digit >= full) & (digit > 0)
        return np.rint(canvas * np.float32(255 / _FULL)).astype(np.uint8), mask


def _column(values: IntArray) -> FloatArray:
    """[B, G] -> float32 [B, G, 1, 1]."""
    return values[:, :, None, None].astype(np.float32)


def _paste(
    glyphs: FloatArray,
    side: int,
    top: IntArray,
    left: IntArray,
    extent: IntArray,
    row: IntArray,
    column: IntArray,
) -> FloatArray:
    """Sum of the glyphs [B, G, 8, 8], each with its scan pixel (row, column) at (top, left): [B, S, S]."""
    rows = interpolation_weights(side, top, extent, row) @ glyphs  # [B, G, S, 8]
    columns = interpolation_weights(side, left, extent, column)  # [B, G, S, 8]
    batch, num, _, _ = rows.shape
    # One matrix product per canvas, over the columns of all glyphs.
    rows = rows.transpose(0, 2, 1, 3).reshape(batch, side, num * SCAN_SIZE)
    columns = columns.transpose(0, 2, 1, 3).reshape(batch, side, num * SCAN_SIZE)
    return rows @ columns.transpose(0, 2, 1)


def object_patches(masks: torch.Tensor, patch_size: int, min_coverage: float = 0.1) -> torch.Tensor:
    """The patches that show the object.

    Args:
        masks: bool [B, S, S].
        patch_size: side of a patch in pixels; divides S.
        min_coverage: share of a patch's pixels that must belong to the object. The patch with the largest
            share always counts, unless that share is 0.

    Returns:
        bool [B, (S / patch_size)²], patches in row-major order, as in a vision transformer.

    Raises:
        ValueError: the masks have another shape, or the patch size does not divide S.
    """
    if masks.dim() != 3 or masks.shape[1] != masks.shape[2]:
        raise ValueError(f"masks must have shape [B, S, S], got {list(masks.shape)}")
    side = masks.shape[1]
    if patch_size < 1 or side % patch_size:
        raise ValueError(f"patch_size {patch_size} does not divide the canvas' {side} pixels")
    grid = side // patch_size
    tiles = masks.reshape(-1, grid, patch_size, grid, patch_size)
    covered = tiles.sum(dim=(2, 4)).flatten(1)  # [B, grid²], pixels
    enough = covered >= min_coverage * patch_size**2
    largest = covered.amax(dim=1, keepdim=True) if len(covered) else covered
    return (covered > 0) & (enough | (covered == largest))
