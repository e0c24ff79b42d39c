"""Where a file that is named may be."""

from __future__ import annotations

#: How the name of a repository of the Hugging Face hub begins, as of timm.
HUB_PREFIXES = ("hf-hub:", "hf_hub:")


def is_path(name: str) -> bool:
    """Return whether a name is the path of a file, and no address and no repository."""
    return "://" not in name and not name.startswith(HUB_PREFIXES)
