"""The models of the EViT paper. Importing this module registers their names with timm."""

from evit_ext.models.deit import deit_base, deit_small, deit_tiny

__all__ = ["deit_base", "deit_small", "deit_tiny"]
