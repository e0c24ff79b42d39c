"""Models in folders and on the Hugging Face hub, which carry their keep rate: to be read by timm, too."""

from evit_ext.hub.loading import from_pretrained
from evit_ext.hub.saving import push_to_hub, save_pretrained

__all__ = ["from_pretrained", "push_to_hub", "save_pretrained"]
