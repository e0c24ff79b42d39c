"""Configurations that no model or objective can be built of, and what is said of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_config import TINY, config

from evit_ext.models.by_name import create_dense, create_evit
from evit_ext.training import TrainConfig, build_model, build_objective, load_initial

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "deit_smal"}, "there is no model 'deit_smal': the nearest names are deit_small"),
        ({"model": "resnet18"}, "ResNet is not supported: expected a vision transformer"),
        ({"model_args": {"num_classes": 3}}, "model_args: num_classes is a field of its own, num_classes"),
        (
            {"model_args": {"drop_path_rate": 0.1}},
            "model_args: drop_path_rate is a field of its own, drop_path",
        ),
        ({"pretrained": True, "initial_checkpoint": "x.pth"}, "not from both, got pretrained and 'x.pth'"),
        ({"model_args": {"features_only": True}}, "is a FeatureGetterNet, which has no logits of 5 classes"),
        ({"drop_loc": (1, 12)}, r"drop_loc must be in \[0, 12\)"),
    ],
)
def test_errors_of_models(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message), torch.device("meta"):
        build_model(TrainConfig(**settings), 5)


def test_other_errors_of_models() -> None:
    with pytest.raises(TypeError, match="deit_small cannot be built with .*bred"), torch.device("meta"):
        build_model(TrainConfig(model_args={"bred": 1}), 5)
    with pytest.raises(TypeError, match="resnet18 cannot be built with .* argument 'img_size'"):
        build_model(TrainConfig(model="resnet18", img_size=32), 5)
    with pytest.raises(ValueError, match="num_classes must be at least 1, got 0"):
        build_model(TrainConfig(), 0)
    with pytest.raises(FileNotFoundError):
        load_initial(config(initial_checkpoint="nowhere.pth"), build_model(config(), 5))


@pytest.mark.parametrize(
    ("model", "fields", "message"),
    [
        (
            "dynamicvit_tiny",
            {"keep_rate": 0.7, "keep_rate_end_epoch": 3},
            "DynamicViT: its predictors learn the keep rate, which has no schedule",
        ),
        (
            "dynamicvit_tiny",
            {"oracle": "deit_tiny"},
            "DynamicViT: it chooses patches by its predictors: oracle",
        ),
        ("dynamicvit_tiny", {"distillation": "soft", "teacher": "deit_tiny"}, "distillation must be 'none'"),
        ("dynamicvit_tiny", {"token_labels": "x"}, "no head for patches: token_labels must be none"),
        ("dynamicvit_tiny", {"eval_mode": True}, "training mode: eval_mode must be false"),
        (
            "lvvit_tiny",
            {"distillation": "soft", "teacher": "deit_tiny"},
            "distillation must be 'none', or have",
        ),
        (
            "lvvit_tiny",
            {"teacher": "deit_tiny"},
            "teacher must be none, or have model_args return_dense=False",
        ),
        ("lvvit_tiny", {"eval_mode": True}, "training mode: eval_mode must be false, or have"),
        ("lvvit_tiny", {"token_labels": "x", "mixup": 0.8}, "mixup and cutmix must be 0"),
        ("lvvit_tiny", {"oracle": "lvvit_tiny"}, "model_args must have mix_token=False, or oracle be none"),
        ("deit_tiny", {"token_labels": "x"}, "deit_tiny is a DeiT: token_labels need an LV-ViT"),
        ("deit_tiny", {"teacher": "deit_tiny"}, "that must be 'soft' or 'hard', or teacher none"),
        (
            "deit_tiny_distilled",
            {"eval_mode": True, "distillation": "soft", "teacher": "deit_tiny"},
            "apart in training mode only: eval_mode must be false",
        ),
        ("deit_tiny", {"teacher_checkpoint": "x"}, "teacher_args and teacher_checkpoint are of a teacher"),
        ("deit_tiny", {"oracle_args": {"depth": 4}}, "oracle_args and oracle_checkpoint are of an oracle"),
        ("deit_tiny", {"oracle": "deit_tiny", "initial_checkpoint": "x"}, "starts from the oracle's weights"),
        ("deit_tiny", {"oracle": "deit_tiny", "pretrained": True}, "starts from the oracle's weights"),
        (
            "deit_tiny",
            {"distillation": "soft", "teacher": "deit_tiny", "teacher_args": {"keep_rate": 0.5}},
            "teacher_args: the teacher sees all patches, it has no keep_rate",
        ),
        (
            "deit_tiny",
            {"oracle": "deit_tiny", "oracle_args": {"pretrained": False}},
            "oracle_args: pretrained is not to be chosen: see oracle_checkpoint",
        ),
    ],
)
def test_contradictions(model: str, fields: dict[str, Any], message: str) -> None:
    settings = config(model, **fields)
    student = create_evit(model, img_size=32, num_classes=5, **settings.model_args)
    with pytest.raises(ValueError, match=message):
        build_objective(settings, student, "cpu")


def test_a_pretrained_teacher_knows_its_own_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose head for others would be untrained."""
    settings = config(distillation="soft", teacher="deit_small", teacher_args=TINY)
    model = build_model(settings, 5)
    monkeypatch.setattr(
        "evit_ext.training.building.create_dense",
        lambda name, pretrained, **arguments: create_dense(name, **arguments),
    )
    with pytest.raises(
        ValueError, match="teacher deit_small knows 1000 classes, the model has 5: give a teacher_ch"
    ):
        build_objective(settings, model, "cpu")
