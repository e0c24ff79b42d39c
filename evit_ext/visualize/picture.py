"""The picture: a photograph, what each stage kept of it and what scores it got; or a sheet of many."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from evit_ext._util.files import replacing
from evit_ext._util.messages import shown
from evit_ext.visualize.class_names import NamedProbability, most_probable
from evit_ext.visualize.gallery import Gallery, work_saved
from evit_ext.visualize.heat import COLORS, Heat, heat
from evit_ext.visualize.photos import Photo
from evit_ext.visualize.views import RateView, StageView

#: Side of a picture in the large layout and in a contact sheet, in pixels.
LARGE, SMALL = 240, 128
ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
#: The longest side that a format has room for, in pixels; of JPEG, that libjpeg writes.
_LONGEST = {".jpg": 65500, ".jpeg": 65500, ".webp": 16383}
#: What a dropped patch is mixed with, and how much of it; RGB.
PAPER, PAPER_SHARE = (208, 212, 220), 0.86

_INK, _FAINT, _WARN = (29, 36, 51), (96, 108, 130), (192, 42, 42)
_BAR, _BAR_DENSE, _RULE = (232, 89, 12), (92, 114, 153), (214, 218, 226)
_GAP, _MARGIN = 12, 24


def check_ending(path: Path) -> None:
    """Raise ValueError unless a picture can be written to a file of this name."""
    if path.suffix.lower() not in ENDINGS:
        raise ValueError(f"the picture must be a {', '.join(ENDINGS)} file, got {shown(path.name)}")


@cache
def font(size: int) -> Any:
    """Return the font of all text; ModuleNotFoundError where Pillow has none of this size."""
    try:
        return ImageFont.load_default(size)
    except (TypeError, ImportError, OSError) as error:
        raise ModuleNotFoundError(
            f'pictures need Pillow 10.1 or newer, with FreeType: pip install "evit_ext[viz]" ({error})'
        ) from error


def draw(gallery: Gallery) -> Image.Image:
    """Draw one photograph large, or a contact sheet of several: RGB.

    Raises:
        ModuleNotFoundError: Pillow is older than 10.1, or has no FreeType.
    """
    return _large(gallery, gallery.photos[0]) if len(gallery.photos) == 1 else _sheet(gallery)


def save(image: Image.Image, path: Path) -> None:
    """Write a picture to a file whose name :func:`check_ending` allows.

    Raises:
        ValueError: the format has no room for a picture so large.
    """
    longest = _LONGEST.get(path.suffix.lower(), max(image.size))
    if max(image.size) > longest:
        raise ValueError(
            f"a {path.suffix} picture has sides of up to {longest} pixels, and this one is "
            f"{image.width} x {image.height}: write a .png, or show fewer photographs or keep rates"
        )
    with replacing(path, "wb") as file:
        image.save(file, Image.registered_extensions()[path.suffix.lower()])


def kept_picture(image: Image.Image, kept: Tensor, side: int) -> Image.Image:
    """Return an image whose dropped patches are faded: RGB, the longer side as :func:`fitted` makes it.

    Args:
        image: RGB, as the model sees it.
        kept: bool [rows, columns]. Of these patches, every pixel is the image's.
        side: in pixels.
    """
    pixels = np.asarray(fitted(image, side), dtype=np.float64)
    faded = pixels.mean(axis=2, keepdims=True) * (1 - PAPER_SHARE) + np.array(PAPER) * PAPER_SHARE
    there = spread(kept.numpy(), pixels.shape[:2])[..., None]
    return Image.fromarray(np.rint(np.where(there, pixels, faded)).astype(np.uint8))


def merged_picture(image: Image.Image, groups: Tensor, side: int) -> Image.Image:
    """Return an image in which patches that were merged into one token are of one colour, their mean.

    Args:
        image: RGB, as the model sees it.
        groups: int64 [rows, columns], the number of each patch's token. A patch by itself stays as it is.
        side: in pixels, as for :func:`kept_picture`.
    """
    pixels = np.asarray(fitted(image, side), dtype=np.float64)
    owner = spread(groups.numpy(), pixels.shape[:2])
    sums = [np.bincount(owner.ravel(), weights=pixels[..., channel].ravel()) for channel in range(3)]
    means = np.stack(sums, axis=1) / np.maximum(np.bincount(owner.ravel()), 1)[:, None]
    alone = (np.bincount(groups.numpy().ravel(), minlength=len(means)) == 1)[owner][..., None]
    return Image.fromarray(np.rint(np.where(alone, pixels, means[owner])).astype(np.uint8))


def _stage_picture(photo: Photo, stage: StageView, side: int) -> Image.Image:
    if stage.groups is not None:
        return merged_picture(photo.image, stage.groups, side)
    return kept_picture(photo.image, stage.kept, side)


def heat_picture(found: Heat, size: tuple[int, int]) -> Image.Image:
    """Return the levels as colours, paper where there is none: RGB of `size`, (width, height)."""
    colors = np.where(found.levels[..., None] >= 0, COLORS[found.levels], np.array(PAPER, dtype=np.uint8))
    return Image.fromarray(spread(colors, (size[1], size[0])))


def fitted(image: Image.Image, side: int) -> Image.Image:
    """Return the image with its longer side at most `side`, or enlarged by the whole number next below it."""
    longer = max(image.size)
    if longer <= side:
        return image.resize([length * (side // longer) for length in image.size], Image.Resampling.NEAREST)
    return image.resize(
        [max(1, round(length * side / longer)) for length in image.size], Image.Resampling.LANCZOS
    )


def spread(cells: npt.NDArray[Any], size: tuple[int, int]) -> npt.NDArray[Any]:
    """Return cells [rows, columns, …] as large as a picture: [height, width, …], each cell at its place."""
    for axis, length in enumerate(size):
        # The cell in which the middle of a pixel lies.
        number = (np.arange(length) * 2 + 1) * cells.shape[axis] // (2 * length)
        cells = cells.take(number, axis=axis)
    return cells


class _Page:
    """A canvas that text and pictures are put on."""

    def __init__(self, width: int, height: int) -> None:
        self.image = Image.new("RGB", (width, height), "white")
        self.pen = ImageDraw.Draw(self.image)

    def text(
        self, x: int, y: int, text: str, size: int = 13, color: Any = _INK, width: int | None = None
    ) -> None:
        self.pen.text((x, y), text if width is None else _shortened(text, size, width), color, font(size))

    def bars(self, x: int, y: int, width: int, best: Sequence[NamedProbability], color: Any) -> int:
        """Draw the classes with a bar each; returns the height that they take."""
        for number, (name, probability) in enumerate(best):
            top = y + 30 * number
            share = f"{100 * probability:.1f} %"
            self.text(x, top, name, 12, width=width - _width(share, 12) - 8)
            self.text(x + width - _width(share, 12), top, share, 12)
            self.pen.rectangle((x, top + 18, x + width - 1, top + 22), _RULE)
            if (long := round(width * probability)) > 0:
                self.pen.rectangle((x, top + 18, x + long - 1, top + 22), color)
        return 30 * len(best)


def _large(gallery: Gallery, photo: Photo) -> Image.Image:
    shown = fitted(photo.image, LARGE)
    width, height = shown.size
    cell = max(width, 200)
    stages = max(len(rate.stages) for rate in photo.view.rates)
    head = 76 + (20 if gallery.warning else 0)
    section = 44 + 2 * (height + 42)
    least = 44 + height + 42 + 24 + 30 * 3 + 34 + 30 * 3
    section = max(section, least if photo.view.dense.probabilities is not None else section)
    page = _Page(
        2 * _MARGIN + cell + stages * (cell + _GAP) + 8,
        head + section * len(photo.view.rates) + _MARGIN,
    )
    inner = page.image.width - 2 * _MARGIN
    page.text(_MARGIN, 18, photo.name, 20, width=inner)
    page.text(_MARGIN, 46, f"{gallery.model}, weights: {gallery.weights}", 13, _FAINT, inner)
    if gallery.warning:
        page.text(_MARGIN, 66, gallery.warning, 14, _WARN, inner)
    best = most_probable(photo.view.dense.probabilities, gallery.class_names, 3)
    for number, rate in enumerate(photo.view.rates):
        top = head + section * number
        page.pen.line((_MARGIN, top, page.image.width - _MARGIN - 1, top), _RULE)
        page.text(_MARGIN, top + 10, _heading(rate, photo.view.dense), 16, width=inner)
        y, x = top + 44, _MARGIN
        page.image.paste(shown, (x, y))
        rows, columns = photo.view.grid
        page.text(x, y + height + 4, "as the model sees it", 13)
        page.text(x, y + height + 21, f"{rows * columns} patches, {rows} x {columns}", 12, _FAINT)
        below = y + height + 46
        if best:
            page.text(x, below, "with all patches", 12, _FAINT)
            below += 20 + page.bars(x, below + 20, cell, best, _BAR_DENSE)
            page.text(x, below + 4, f"at keep rate {rate.keep_rate:g}", 12, _FAINT)
            found = most_probable(rate.probabilities, gallery.class_names, 3)
            page.bars(x, below + 24, cell, found, _BAR)
        else:
            page.text(x, below, "the model has no classes", 12, _FAINT)
        x += cell + _GAP + 8
        _stages(page, photo, rate, (x, y), cell)
    page.text(
        _MARGIN, page.image.height - 20, f"scores: {gallery.scores}; a level each patch", 12, _FAINT, inner
    )
    return page.image


def _stages(page: _Page, photo: Photo, rate: RateView, corner: tuple[int, int], cell: int) -> None:
    """Draw each stage of one keep rate: the patches that are left, and below them the scores."""
    x, y = corner
    total = photo.view.grid[0] * photo.view.grid[1]
    for number, stage in enumerate(rate.stages):
        picture = _stage_picture(photo, stage, LARGE)
        page.image.paste(picture, (x, y))
        left = int(stage.kept.sum())
        what = "patches" if stage.groups is None else "tokens"
        page.text(x, y + picture.height + 4, f"stage {number + 1}: {left} of {total} {what} left", 13)
        word = "fused into one token" if stage.fused else "dropped" if stage.groups is None else "merged"
        page.text(x, y + picture.height + 21, f"{stage.dropped} {word} here", 12, _FAINT)
        found, below = heat(stage.scores), y + picture.height + 42
        if (found.levels >= 0).any():  # the rule ranks patches
            page.image.paste(heat_picture(found, picture.size), (x, below))
            _legend(page, x, below + picture.height + 6, min(cell, picture.width), found)
        x += cell + _GAP


def _legend(page: _Page, x: int, y: int, width: int, found: Heat) -> None:
    low, high = f"{found.low:.2g}", f"{found.high:.2g}"
    page.text(x, y, low, 12, _FAINT)
    page.text(x + width - _width(high, 12), y, high, 12, _FAINT)
    start, end = x + _width(low, 12) + 8, x + width - _width(high, 12) - 8
    if end > start:
        page.image.paste(Image.fromarray(COLORS[None]).resize((end - start, 8)), (start, y + 4))


def _sheet(gallery: Gallery) -> Image.Image:
    """A tile a photograph: for each keep rate a row with the photograph and its stages."""
    stages = max(len(rate.stages) for photo in gallery.photos for rate in photo.view.rates)
    rates = len(gallery.photos[0].view.rates)
    sizes = [fitted(photo.image, SMALL).size for photo in gallery.photos]
    side, high = max(size[0] for size in sizes), max(size[1] for size in sizes)
    width = max((1 + stages) * (side + 6) - 6, 320)
    height = 22 + rates * (high + 40) + 14
    across = 1 if len(gallery.photos) < 4 else 2
    head = 62 + (20 if gallery.warning else 0)
    lines = -(-len(gallery.photos) // across)
    page = _Page(2 * _MARGIN + across * (width + 2 * _GAP) - 2 * _GAP, head + lines * height + _MARGIN)
    inner = page.image.width - 2 * _MARGIN
    page.text(_MARGIN, 14, f"{gallery.model}: {len(gallery.photos)} photographs", 18, width=inner)
    page.text(_MARGIN, 38, f"weights: {gallery.weights}", 12, _FAINT, inner)
    if gallery.warning:
        page.text(_MARGIN, 56, gallery.warning, 13, _WARN, inner)
    for number, photo in enumerate(gallery.photos):
        x = _MARGIN + number % across * (width + 2 * _GAP)
        y = head + number // across * height
        page.pen.line((x, y, x + width - 1, y), _RULE)
        page.text(x, y + 4, photo.name, 13, width=width)
        y += 22
        for rate in photo.view.rates:
            page.image.paste(fitted(photo.image, SMALL), (x, y))
            for stage, found in enumerate(rate.stages):
                left = x + (1 + stage) * (side + 6)
                page.image.paste(_stage_picture(photo, found, SMALL), (left, y))
            page.text(x, y + high + 2, _heading(rate, photo.view.dense), 11, _FAINT, width)
            page.text(x, y + high + 17, _told(gallery, photo, rate), 12, width=width)
            y += high + 40
    return page.image


def _heading(rate: RateView, dense: RateView) -> str:
    return (
        f"keep rate {rate.keep_rate:g}: {rate.macs / 1e9:.3g} of {dense.macs / 1e9:.3g} GMACs, "
        f"{100 * work_saved(rate, dense):.0f} % of the work saved"
    )


def _told(gallery: Gallery, photo: Photo, rate: RateView) -> str:
    """What the model takes a photograph for, with all patches and at a keep rate."""
    best = [most_probable(view.probabilities, gallery.class_names, 1) for view in (photo.view.dense, rate)]
    if not best[0]:
        return "the model has no classes"
    (before,), (after,) = best
    now, then = f"{100 * after.probability:.1f} %", f"{100 * before.probability:.1f} %"
    name = "" if before.name == after.name else f"{before.name} "
    return f"{after.name} {now}, with all patches {name}{then}"


def _width(text: str, size: int) -> int:
    return int(font(size).getlength(text)) + 1


def _shortened(text: str, size: int, width: int) -> str:
    """Return the text, or as much of it as fits, with three dots."""
    if _width(text, size) <= width:
        return text
    while text and _width(text + "...", size) > width:
        text = text[:-1]
    return text + "..."
