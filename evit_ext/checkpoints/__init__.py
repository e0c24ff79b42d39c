"""Weights from files: published ones, timm's and our own."""

from evit_ext.checkpoints.loading import LoadedCheckpoint, load_checkpoint

__all__ = ["LoadedCheckpoint", "load_checkpoint"]
