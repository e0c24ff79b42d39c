"""Weights from files and to files: published ones, timm's, our own, and those of the Hugging Face hub."""

from evit_ext.weights.loading import LoadedCheckpoint, load_checkpoint
from evit_ext.weights.pretrained import from_pretrained
from evit_ext.weights.saving import push_to_hub, save_pretrained

__all__ = ["LoadedCheckpoint", "from_pretrained", "load_checkpoint", "push_to_hub", "save_pretrained"]
