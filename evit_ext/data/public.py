"""The public names of evit_ext.data, which its __init__ imports when they are asked for."""

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
