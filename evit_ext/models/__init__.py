"""The models of the EViT paper, and DynamicViT to compare with. Importing it registers them with timm."""

from evit_ext.models.deit import deit_base, deit_small, deit_tiny
from evit_ext.models.dynamicvit import dynamicvit_base, dynamicvit_small, dynamicvit_tiny
from evit_ext.models.lvvit import lvvit_large, lvvit_medium, lvvit_small, lvvit_tiny

__all__ = [
    "deit_base",
    "deit_small",
    "deit_tiny",
    "dynamicvit_base",
    "dynamicvit_small",
    "dynamicvit_tiny",
    "lvvit_large",
    "lvvit_medium",
    "lvvit_small",
    "lvvit_tiny",
]
