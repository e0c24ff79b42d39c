"""Models with their keep rate, saved to folders and the Hugging Face hub in a format that timm reads too."""

from evit_ext.hub.loading import from_pretrained
from evit_ext.hub.saving import push_to_hub, save_pretrained

__all__ = ["from_pretrained", "push_to_hub", "save_pretrained"]
