"""Data that ships with the package: real handwritten digits, plain and among clutter; no download."""

from evit_ext.data.cluttered_digits import (
    DIFFICULTIES,
    CanvasBatch,
    ClutteredDigits,
    Difficulty,
    object_patches,
)
from evit_ext.data.digits import Digits, denormalize, normalize

__all__ = [
    "DIFFICULTIES",
    "CanvasBatch",
    "ClutteredDigits",
    "Difficulty",
    "Digits",
    "denormalize",
    "normalize",
    "object_patches",
]
