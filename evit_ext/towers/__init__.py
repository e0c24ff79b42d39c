"""Vision towers of language models: fewer tokens of an image for the language model, and a faster encoder.

:func:`apply` changes a vision-language model of transformers, :func:`write_placeholders` its processor.
"""

from evit_ext.towers.applying import apply, num_image_tokens, remove
from evit_ext.towers.placeholders import check_placeholders, restore_placeholders, write_placeholders

__all__ = [
    "apply",
    "check_placeholders",
    "num_image_tokens",
    "remove",
    "restore_placeholders",
    "write_placeholders",
]
