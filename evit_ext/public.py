"""The public names of evit_ext; importing them registers the models with timm."""

from evit_ext import models, ops, tokens
from evit_ext._util.version import VERSION as __version__
from evit_ext.cost.budget import fit_budget
from evit_ext.cost.comparison import compare_costs
from evit_ext.cost.depth import fit_keep_rates
from evit_ext.cost.layers import layer_costs
from evit_ext.cost.macs import count_macs
from evit_ext.patching.applying import apply, remove
from evit_ext.patching.capturing import cuda_graph
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
    "cuda_graph",
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
