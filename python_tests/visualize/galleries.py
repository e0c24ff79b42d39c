"""Galleries that need no model: views whose every value is chosen."""

from __future__ import annotations

import math

import torch
from PIL import Image

from evit_ext.visualize.gallery import Gallery
from evit_ext.visualize.photos import Photo
from evit_ext.visualize.views import ImageView, RateView, StageView

RATES = (0.75, 0.5)
CLASSES = ["cat", "dog", "</script><script>document.title='broken in'</script>", "d & e", "é"]


def make_view(seed: int = 0, rows: int = 2, columns: int = 4, classes: int = 5) -> ImageView:
    """A view of patches that are kept at random, in two stages, at keep rates 0.75 and 0.5."""
    generator = torch.Generator().manual_seed(seed)
    patches = rows * columns

    def probabilities() -> torch.Tensor:
        return torch.randn(classes, generator=generator).mul(2).softmax(0)

    rates = []
    for keep_rate in RATES:
        stages, left = [], torch.ones(patches, dtype=torch.bool)
        for _ in range(2):
            scores = torch.rand(patches, generator=generator).where(left, math.nan)
            best = scores.nan_to_num(-1).argsort(descending=True)[: math.ceil(keep_rate * int(left.sum()))]
            kept = torch.zeros(patches, dtype=torch.bool)
            kept[best] = True
            dropped = int(left.sum() - kept.sum())
            shape = (rows, columns)
            stages.append(StageView(kept.reshape(shape), scores.reshape(shape), dropped, True))
            left = kept
        rates.append(RateView(keep_rate, tuple(stages), probabilities(), round(4e9 * keep_rate)))
    return ImageView((rows, columns), RateView(1.0, (), probabilities(), 4_000_000_000), tuple(rates))


def make_image(seed: int = 0, width: int = 64, height: int = 32) -> Image.Image:
    """An image of noise, dark, so that what is faded is lighter everywhere."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randint(0, 120, (height, width, 3), dtype=torch.uint8, generator=generator)
    return Image.fromarray(noise.numpy())


def make_gallery(photos: int = 1, warning: str = "", name: str = "photo") -> Gallery:
    """A gallery of the above."""
    shown = [Photo(f"{name} {number}", make_image(number), make_view(number)) for number in range(photos)]
    return Gallery("deit_micro", "a file", warning, "attention", CLASSES, shown)
