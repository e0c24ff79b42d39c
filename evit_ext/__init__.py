"""EViT for PyTorch: vision transformers that keep the patches that matter and fuse the rest.

The method is that of Liang et al., "Not All Patches are What You Need: Expediting Vision Transformers via
Token Reorganizations" (ICLR 2022, arXiv 2202.07800). :func:`apply` turns a vision transformer of timm or
transformers into an EViT, :mod:`evit_ext.models` builds the paper's, :mod:`evit_ext.ops` has the operators.
The packages ``training``, ``data``, ``export``, ``towers``, ``visualize`` and ``benchmark`` are imported when
first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

from evit_ext._util.lazy import is_command, lazily
from evit_ext._util.version import VERSION

# At once, and not when first asked for: it registers the models with timm. The command does without until it
# has checked what it is asked.
if TYPE_CHECKING or not is_command():
    from evit_ext.public import *  # noqa: F403

#: Imported when first asked for: ``import evit_ext`` alone would otherwise wait for all of them.
_LAZY = frozenset(
    {"benchmark", "data", "export", "models", "ops", "tokens", "towers", "training", "visualize"}
)

__version__ = VERSION

_public = lazily(__name__, "evit_ext.public")


def __getattr__(name: str) -> Any:
    return importlib.import_module(f"evit_ext.{name}") if name in _LAZY else _public(name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_public("__all__"), *_LAZY})
