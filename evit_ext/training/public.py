"""The public names of evit_ext.training, which its __init__ imports when they are asked for."""

from evit_ext.training.building import build_model, build_objective, load_initial
from evit_ext.training.compiling import allow_recompiles
from evit_ext.training.config import TrainConfig, load_config, recipe_names
from evit_ext.training.epoch_sums import EpochResult
from evit_ext.training.evaluation import Evaluation, evaluate
from evit_ext.training.loaders import Batch, Loaders
from evit_ext.training.objectives import (
    Classification,
    Distillation,
    DynamicViTLoss,
    DynamicViTTraining,
    Guided,
    Objective,
    ObjectiveOutput,
    TokenLabelLoss,
    TokenLabelTraining,
    build_criterion,
)
from evit_ext.training.precision import (
    Precision,
    attention_for_training,
    autocast,
    choose_precision,
)
from evit_ext.training.progress import Progress
from evit_ext.training.ranks import Ranks, join
from evit_ext.training.recipe import Recipe
from evit_ext.training.run.checkpoints import RunCheckpoints
from evit_ext.training.run.run import Run
from evit_ext.training.run.stopping import Stopped
from evit_ext.training.run.unreadable import TooManyUnreadable
from evit_ext.training.sharding import distribute
from evit_ext.training.throughput import measure_throughput
from evit_ext.training.trainer import StepResult, Trainer

__all__ = [
    "Batch",
    "Classification",
    "Distillation",
    "DynamicViTLoss",
    "DynamicViTTraining",
    "EpochResult",
    "Evaluation",
    "Guided",
    "Loaders",
    "Objective",
    "ObjectiveOutput",
    "Precision",
    "Progress",
    "Ranks",
    "Recipe",
    "Run",
    "RunCheckpoints",
    "StepResult",
    "Stopped",
    "TokenLabelLoss",
    "TokenLabelTraining",
    "TooManyUnreadable",
    "TrainConfig",
    "Trainer",
    "allow_recompiles",
    "attention_for_training",
    "autocast",
    "build_criterion",
    "build_model",
    "build_objective",
    "choose_precision",
    "distribute",
    "evaluate",
    "join",
    "load_config",
    "load_initial",
    "measure_throughput",
    "recipe_names",
]
