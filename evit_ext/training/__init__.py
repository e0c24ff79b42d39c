"""Training: a thin loop around timm's parts. Its own is the keep rate; `evit_ext.demo` shows it at work."""

from evit_ext.training.building import build_criterion, build_model, build_objective
from evit_ext.training.compiling import allow_recompiles
from evit_ext.training.config import TrainConfig, load_config, recipe_names
from evit_ext.training.dynamicvit_loss import DynamicViTLoss
from evit_ext.training.evaluation import Evaluation, evaluate
from evit_ext.training.objectives import (
    Classification,
    Distillation,
    DynamicViTTraining,
    Guided,
    Objective,
    ObjectiveOutput,
    TokenLabelTraining,
)
from evit_ext.training.precision import Precision, autocast, choose_precision
from evit_ext.training.progress import Progress
from evit_ext.training.recipe import Recipe
from evit_ext.training.run_checkpoints import RunCheckpoints
from evit_ext.training.throughput import measure_throughput
from evit_ext.training.token_labels import TokenLabelLoss
from evit_ext.training.trainer import EpochResult, Trainer

__all__ = [
    "Classification",
    "Distillation",
    "DynamicViTLoss",
    "DynamicViTTraining",
    "EpochResult",
    "Evaluation",
    "Guided",
    "Objective",
    "ObjectiveOutput",
    "Precision",
    "Progress",
    "Recipe",
    "RunCheckpoints",
    "TokenLabelLoss",
    "TokenLabelTraining",
    "TrainConfig",
    "Trainer",
    "allow_recompiles",
    "autocast",
    "build_criterion",
    "build_model",
    "build_objective",
    "choose_precision",
    "evaluate",
    "load_config",
    "measure_throughput",
    "recipe_names",
]
