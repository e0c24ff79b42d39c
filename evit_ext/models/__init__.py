"""The models of the EViT paper, and DynamicViT to compare with. Importing it registers them with timm."""

from evit_ext.models.deit import (
    deit_base,
    deit_base_distilled,
    deit_small,
    deit_small_256,
    deit_small_272,
    deit_small_288,
    deit_small_304,
    deit_small_distilled,
    deit_tiny,
    deit_tiny_distilled,
)
from evit_ext.models.dynamicvit import (
    dynamicvit_base,
    dynamicvit_small,
    dynamicvit_tiny,
)
from evit_ext.models.lvvit import (
    lvvit_large,
    lvvit_medium,
    lvvit_small,
    lvvit_tiny,
)

__all__ = [
    "deit_base",
    "deit_base_distilled",
    "deit_small",
    "deit_small_256",
    "deit_small_272",
    "deit_small_288",
    "deit_small_304",
    "deit_small_distilled",
    "deit_tiny",
    "deit_tiny_distilled",
    "dynamicvit_base",
    "dynamicvit_small",
    "dynamicvit_tiny",
    "lvvit_large",
    "lvvit_medium",
    "lvvit_small",
    "lvvit_tiny",
]
