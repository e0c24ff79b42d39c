"""Training: a thin loop around timm's parts. Its own is the keep rate; `evit_ext.demo` shows it at work."""

from evit_ext.training.dynamicvit_loss import DynamicViTLoss
from evit_ext.training.engine import EpochResult, Evaluation, Trainer, evaluate
from evit_ext.training.precision import Precision, autocast, choose_precision
from evit_ext.training.progress import Progress
from evit_ext.training.recipe import FINE_TUNE, FROM_SCRATCH, Recipe
from evit_ext.training.run_checkpoints import RunCheckpoints
from evit_ext.training.throughput import measure_throughput
from evit_ext.training.token_labels import TokenLabelLoss

__all__ = [
    "FINE_TUNE",
    "FROM_SCRATCH",
    "DynamicViTLoss",
    "EpochResult",
    "Evaluation",
    "Precision",
    "Progress",
    "Recipe",
    "RunCheckpoints",
    "TokenLabelLoss",
    "Trainer",
    "autocast",
    "choose_precision",
    "evaluate",
    "measure_throughput",
]
