"""What pictures and pages are made of: photographs, and what there is to say about the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from evit_ext.visualize.photos import Photo
from evit_ext.visualize.views import RateView


@dataclass(frozen=True)
class Gallery:
    """Photographs that one model looked at, all at the same keep rates.

    Attributes:
        model: its name.
        weights: in words, where they come from.
        warning: what makes the patches mean less than they seem to, such as untrained weights; "" for
            nothing.
        scores: in words, what the scores are.
        class_names: None calls classes by their numbers.
        photos: at least one.

    Raises:
        ValueError: there is no photograph, or they differ in their keep rates.
    """

    model: str
    weights: str
    warning: str
    scores: str
    class_names: Sequence[str] | None
    photos: Sequence[Photo]

    def __post_init__(self) -> None:
        if not self.photos:
            raise ValueError("a gallery has at least one photograph, got none")
        if len({tuple(rate.keep_rate for rate in photo.view.rates) for photo in self.photos}) > 1:
            raise ValueError("the photographs of a gallery are at the same keep rates, these differ")


def work_saved(rate: RateView, dense: RateView) -> float:
    """Return the share of the multiply-accumulates that dropping patches saves, 0 to 1."""
    return 1 - rate.macs / dense.macs
