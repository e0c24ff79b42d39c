"""What training minimises: classification, distillation, token labels, DynamicViT's losses, an oracle."""

from evit_ext.training.objectives.distillation import Distillation
from evit_ext.training.objectives.dynamicvit import DynamicViTLoss, DynamicViTTraining
from evit_ext.training.objectives.guided import Guided
from evit_ext.training.objectives.objective import (
    Classification,
    Criterion,
    Objective,
    ObjectiveOutput,
    build_criterion,
)
from evit_ext.training.objectives.token_labels import TokenLabelLoss, TokenLabelTraining

__all__ = [
    "Classification",
    "Criterion",
    "Distillation",
    "DynamicViTLoss",
    "DynamicViTTraining",
    "Guided",
    "Objective",
    "ObjectiveOutput",
    "TokenLabelLoss",
    "TokenLabelTraining",
    "build_criterion",
]
