"""Which patches a model keeps of photographs, as a picture and as a page: see ``evit visualize --help``."""

from evit_ext.visualize.views import (
    ImageView,
    RateView,
    StageView,
    meaning_of_scores,
    surviving_patches,
    view_images,
)

__all__ = [
    "ImageView",
    "RateView",
    "StageView",
    "meaning_of_scores",
    "surviving_patches",
    "view_images",
]
