"""EViT for PyTorch: vision transformers that keep the patches that matter and fuse the rest.

The method is that of Liang et al., "Not All Patches are What You Need: Expediting Vision Transformers via
Token Reorganizations" (ICLR 2022, arXiv 2202.07800). :func:`apply` turns a vision transformer of timm or
transformers into an EViT, :mod:`evit_ext.models` builds the paper's, :mod:`evit_ext.ops` has the operators.
The packages ``training``, ``data``, ``export``, ``visualize`` and ``benchmark`` are imported when first used.
"""

import importlib
from types import ModuleType

import torch  # noqa: F401  # loads the libraries that the compiled module needs

try:
    from evit_ext import _C  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"the compiled module evit_ext._C cannot be imported ({error}). If Python runs in a clone of the "
        "repository, it finds the sources there instead of the installed package: run it elsewhere, or "
        "install the clone with: pip install --no-build-isolation --editable ."
    ) from error

from evit_ext import models, ops, tokens
from evit_ext._util.version import VERSION as __version__
from evit_ext.cost.budget import fit_budget
from evit_ext.cost.comparison import compare_costs
from evit_ext.cost.depth import fit_keep_rates
from evit_ext.cost.layers import layer_costs
from evit_ext.cost.macs import count_macs
from evit_ext.patching.applying import apply, remove
from evit_ext.patching.keep_rates import set_keep_rate
from evit_ext.patching.oracle import Oracle
from evit_ext.patching.prepacking import prepack
from evit_ext.patching.recording import record_tokens
from evit_ext.tokens.schedule import keep_rate_levels, keep_rate_schedule
from evit_ext.weights import from_pretrained, load_checkpoint, push_to_hub, save_pretrained

__all__ = [
    "Oracle",
    "__version__",
    "apply",
    "compare_costs",
    "count_macs",
    "fit_budget",
    "fit_keep_rates",
    "from_pretrained",
    "keep_rate_levels",
    "keep_rate_schedule",
    "layer_costs",
    "load_checkpoint",
    "models",
    "ops",
    "prepack",
    "push_to_hub",
    "record_tokens",
    "remove",
    "save_pretrained",
    "set_keep_rate",
    "tokens",
]

#: Imported when first asked for: ``import evit_ext`` alone would otherwise wait for all of them.
_LAZY = frozenset({"benchmark", "data", "export", "training", "visualize"})


def __getattr__(name: str) -> ModuleType:
    if name in _LAZY:
        return importlib.import_module(f"evit_ext.{name}")
    raise AttributeError(f"module 'evit_ext' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
