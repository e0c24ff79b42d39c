"""Models and objectives that a configuration asks for: all recipes, all kinds of models, what contradicts."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from timm.data.mixup import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from tiny_config import TINY, config
from torch import nn

from evit_ext import models
from evit_ext.models.by_name import create_dense, create_evit
from evit_ext.models.dynamicvit import DynamicViT
from evit_ext.tokens.stage import find_stages
from evit_ext.training import (
    Classification,
    Distillation,
    DynamicViTTraining,
    Guided,
    TokenLabelTraining,
    TrainConfig,
    build_criterion,
    build_model,
    build_objective,
    load_config,
    load_initial,
    recipe_names,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def dense(tmp_path: Path) -> str:
    """A checkpoint of a tiny DeiT."""
    torch.manual_seed(7)
    path = tmp_path / "dense.pth"
    torch.save(create_dense("deit_small", img_size=32, num_classes=5, **TINY).state_dict(), path)
    return str(path)


@pytest.mark.parametrize("recipe", recipe_names())
def test_recipes_build_in_full(recipe: str) -> None:
    settings = load_config(recipe, pretrained=False)
    with torch.device("meta"):
        model: Any = build_model(settings, 10)
    assert {block.keep_rate for block in find_stages(model)} == {0.7}
    assert len(find_stages(model)) == 3 and model.training
    assert model.num_classes == 10
    rates = [
        block.drop_path1.drop_prob
        for block in model.blocks
        if isinstance(block.drop_path1, timm.layers.DropPath)
    ]
    assert bool(rates) == (settings.drop_path > 0)
    assert not rates or rates[-1] == pytest.approx(settings.drop_path)


@pytest.mark.parametrize("recipe", recipe_names())
def test_recipes_train(recipe: str, dense: str) -> None:
    """A step, with tiny models."""
    np.random.seed(0)
    loaded = load_config(recipe)
    stem = {"stem_dim": 6} if loaded.model.startswith("lvvit") else {}
    changes: dict[str, Any] = {"model_args": {**TINY, **stem}, "img_size": 32, "drop_loc": [1, 2, 3]}
    changes |= {"pretrained": False, "initial_checkpoint": dense} if loaded.pretrained else {}
    changes |= {"oracle_args": TINY, "oracle_checkpoint": dense} if loaded.oracle else {}
    settings = load_config(recipe, **changes)
    model = build_model(settings, 5).train(not settings.eval_mode)
    load_initial(settings, model)
    objective = build_objective(settings, model, "cpu")
    objective.initialize(model)
    images, targets = torch.randn(4, 3, 32, 32), torch.arange(4)
    if settings.mixup > 0 or settings.cutmix > 0:
        mixup = Mixup(
            settings.mixup, settings.cutmix, label_smoothing=settings.label_smoothing, num_classes=5
        )
        images, targets = mixup(images, targets)
    with objective.step(model):
        loss, logits = objective(model, images, targets)
        loss.backward()
    assert logits.shape == (4, 5) and math.isfinite(loss.item())
    assert all(
        parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters()
    )
    if loaded.oracle or loaded.pretrained:
        assert torch.equal(model.state_dict()["head.weight"], torch.load(dense)["head.weight"])


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("deit_small", Classification),
        ("deit_tiny_distilled", Classification),
        ("evit_deit_small_patch16_224", Classification),
        ("vit_tiny_patch16_224", Classification),
        ("lvvit_tiny", TokenLabelTraining),
        ("dynamicvit_tiny", DynamicViTTraining),
        ("dynamicvit_deit_tiny_patch16_224", DynamicViTTraining),
    ],
)
def test_kinds(name: str, kind: type) -> None:
    settings = config(name, fuse_token=False, drop_loc=(1, 3), drop_path=0.2, grad_checkpointing=True)
    model: Any = build_model(settings, 5)
    if isinstance(model, DynamicViT):
        assert model.keep_rate == 0.5 and model.drop_loc == (1, 3)
    else:
        blocks = find_stages(model)
        assert [number for number, block in enumerate(model.blocks) if block in blocks] == [1, 3]
        assert all(block.keep_rate == 0.5 and not block.rule.fuse_token for block in blocks)
    assert model.grad_checkpointing and model.training
    assert model.blocks[3].drop_path1.drop_prob == pytest.approx(0.2)
    objective = build_objective(settings, model, "cpu")
    assert type(objective) is kind
    loss = objective(model, torch.randn(2, 3, 32, 32), torch.tensor([1, 3])).loss
    loss.backward()
    assert loss.isfinite()


def test_the_models_own() -> None:
    with torch.device("meta"):
        ours: Any = build_model(TrainConfig(model="deit_small_288"), 7)
        theirs: Any = build_model(TrainConfig(model="vit_tiny_patch16_224", model_args={"depth": 8}), 7)
        whole: Any = build_model(TrainConfig(model="deit_small", keep_rate=1.0), 7)
    assert ours.patch_embed.img_size == (288, 288)
    assert {block.keep_rate for block in find_stages(ours)} == {0.6}
    assert [block.keep_rate for block in find_stages(theirs)] == [0.7] * 3
    assert theirs.blocks[2] in find_stages(theirs) and theirs.blocks[3] not in find_stages(theirs)
    assert {block.keep_rate for block in find_stages(whole)} == {1.0}


def test_initial_checkpoint(dense: str) -> None:
    """Of another size and other classes, too."""
    weights = torch.load(dense)
    settings = config(initial_checkpoint=dense, img_size=48)
    model = build_model(settings, 9)
    loaded = load_initial(settings, model)
    assert "head as it was, for other classes" in str(loaded)
    assert load_initial(config(), model) is None
    assert model.state_dict()["pos_embed"].shape[1] == 37
    assert torch.equal(model.state_dict()["blocks.2.mlp.fc1.weight"], weights["blocks.2.mlp.fc1.weight"])
    assert model.state_dict()["head.weight"].shape == (9, 24)


def test_criterion() -> None:
    assert type(build_criterion(config())) is nn.CrossEntropyLoss
    smooth = build_criterion(config(label_smoothing=0.2))
    assert isinstance(smooth, LabelSmoothingCrossEntropy) and smooth.smoothing == pytest.approx(0.2)
    for field in ("mixup", "cutmix"):
        assert type(build_criterion(config(label_smoothing=0.2, **{field: 0.3}))) is SoftTargetCrossEntropy


@pytest.mark.parametrize("name", ["deit_small", "deit_small_patch16_224", "evit_deit_small_patch16_224"])
def test_teacher(name: str, dense: str) -> None:
    """However it is named, it is the dense ViT that the weights are of."""
    settings = config(
        distillation="soft", distillation_alpha=0.3, distillation_tau=2.0,
        teacher=name, teacher_args=TINY, teacher_checkpoint=dense,
    )  # fmt: skip
    model = build_model(settings, 5)
    objective = build_objective(settings, model, "cpu")
    assert isinstance(objective, Distillation)
    assert (objective.kind, objective.alpha, objective.tau) == ("soft", 0.3, 2.0)
    assert not objective.teacher.training and not any(p.requires_grad for p in objective.teacher.parameters())
    vit = create_dense("deit_small", img_size=32, num_classes=5, **TINY).eval()
    vit.load_state_dict(torch.load(dense))
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(objective.teacher(images), vit(images))
    elsewhere = build_objective(settings, model, "meta")
    assert isinstance(elsewhere, Distillation) and all(p.is_meta for p in elsewhere.teacher.parameters())


def test_a_teacher_without_a_size_of_images(tmp_path: Path) -> None:
    """A CNN, as DeiT's published teacher."""
    path = tmp_path / "cnn.pth"
    torch.save(timm.create_model("test_resnet", num_classes=5).state_dict(), path)
    settings = config(distillation="hard", teacher="test_resnet", teacher_checkpoint=str(path))
    model = build_model(settings, 5)
    loss = build_objective(settings, model, "cpu")(
        model, torch.randn(2, 3, 32, 32), torch.tensor([0, 1])
    ).loss
    assert loss.isfinite()


def test_dynamicvit_with_a_teacher(dense: str) -> None:
    settings = config(
        "dynamicvit_small", teacher="deit_small", teacher_args=TINY, teacher_checkpoint=dense,
        ratio_weight=3.0, distill_weight=0.25,
    )  # fmt: skip
    model = build_model(settings, 5)
    objective = build_objective(settings, model, "cpu")
    assert isinstance(objective, DynamicViTTraining)
    assert (objective.loss.ratio_weight, objective.loss.distill_weight) == (3.0, 0.25)
    assert objective.loss.keep_ratios == (0.5, 0.25, 0.125)
    parts = objective.loss.parts(
        model(torch.randn(2, 3, 32, 32)), torch.randn(2, 3, 32, 32), torch.tensor([0, 1])
    )
    assert parts.tokens > 0
    assert list(objective.loss.state_dict()) == []


def test_oracle(dense: str) -> None:
    """It is asked at the student's blocks, and its weights are given only by initialize."""
    settings = config(drop_loc=(0, 3), oracle="deit_small", oracle_args=TINY, oracle_checkpoint=dense)
    model: Any = build_model(settings, 5)
    before = model.head.weight.clone()
    objective = build_objective(settings, torch.compile(model, backend="eager"), "cpu")
    assert isinstance(objective, Guided) and isinstance(objective.objective, Classification)
    elsewhere = build_objective(settings, model, "meta")
    assert isinstance(elsewhere, Guided) and all(p.is_meta for p in elsewhere.oracle.parameters())
    vit = objective.oracle.vit
    assert [number for number, block in enumerate(vit.blocks) if block in find_stages(vit)] == [0, 3]
    assert torch.equal(model.head.weight, before)
    objective.initialize(model)
    assert torch.equal(model.head.weight, torch.load(dense)["head.weight"])
    # One of another depth is asked at the quarters of its own.
    args = {**TINY, "depth": 8}
    path = Path(dense).with_name("deep.pth")
    torch.save(create_dense("deit_small", img_size=32, num_classes=9, **args).state_dict(), path)
    deeper = config(oracle="deit_small", oracle_args=args, oracle_checkpoint=str(path))
    model = build_model(deeper, 5)
    objective = build_objective(deeper, model, "cpu")
    assert isinstance(objective, Guided)
    vit = objective.oracle.vit
    assert [number for number, block in enumerate(vit.blocks) if block in find_stages(vit)] == [
        2,
        4,
        6,
    ]
    with objective.step(model):
        assert objective(model, torch.randn(2, 3, 32, 32), torch.tensor([0, 1])).loss.isfinite()
    with pytest.raises(ValueError, match="the oracle's weights do not fit the student"):
        objective.initialize(model)


def test_oracle_of_an_lvvit(tmp_path: Path) -> None:
    """Without MixToken, which an oracle would not see."""
    args, path = {**TINY, "stem_dim": 6}, tmp_path / "lvvit.pth"
    torch.save(create_dense("lvvit_tiny", img_size=32, num_classes=5, **args).state_dict(), path)
    settings = config(
        "lvvit_tiny", oracle="lvvit_tiny", oracle_args=args, oracle_checkpoint=str(path),
        model_args={"mix_token": False},
    )  # fmt: skip
    model = build_model(settings, 5)
    objective = build_objective(settings, model, "cpu")
    objective.initialize(model)
    assert isinstance(objective, Guided) and isinstance(objective.objective, TokenLabelTraining)
    with objective.step(model):
        loss = objective(model, torch.randn(2, 3, 32, 32), torch.tensor([0, 1])).loss
        loss.backward()
    assert loss.isfinite()


def test_token_labels() -> None:
    settings = config(
        "lvvit_tiny", label_smoothing=0.2, dense_weight=0.3, cls_weight=0.9, token_labels="folder"
    )
    objective = build_objective(settings, build_model(settings, 5), "cpu")
    assert isinstance(objective, TokenLabelTraining) and objective.label_smoothing == 0.2
    assert (objective.loss.dense_weight, objective.loss.cls_weight) == (0.3, 0.9)


def test_an_lvvit_without_auxiliary_head(dense: str) -> None:
    plain = {"return_dense": False, "mix_token": False}
    for fields, kind in (
        ({}, Classification),
        (
            {
                "distillation": "hard",
                "teacher": "deit_small",
                "teacher_args": TINY,
                "teacher_checkpoint": dense,
            },
            Distillation,
        ),
    ):
        settings = config("lvvit_tiny", model_args=plain, **fields)
        model = build_model(settings, 5)
        objective = build_objective(settings, model, "cpu")
        assert type(objective) is kind
        assert objective(model, torch.randn(2, 3, 32, 32), torch.tensor([0, 1])).loss.isfinite()


def test_create_by_name() -> None:
    evit: Any
    shallow: Any
    with torch.device("meta"):
        assert type(create_dense("deit_tiny")) is type(models.deit_tiny())
        assert find_stages(create_dense("deit_tiny")) == []
        assert isinstance(create_evit("dynamicvit_tiny", 0.6), DynamicViT)
        evit = create_evit("vit_tiny_patch16_224", (0.9, 0.8, 0.7))
        assert [block.keep_rate for block in find_stages(evit)] == [0.9, 0.8, 0.7]
        shallow = create_evit("deit_tiny", depth=4)
        assert [block in find_stages(shallow) for block in shallow.blocks] == [
            False,
            True,
            True,
            True,
        ]


def test_wrapped_models_are_known() -> None:
    settings = config("dynamicvit_small")
    model = torch.compile(build_model(settings, 5), backend="eager")
    assert isinstance(build_objective(settings, model, "cpu"), DynamicViTTraining)


def test_a_teacher_of_other_classes(dense: str) -> None:
    settings = config(distillation="soft", teacher="deit_small", teacher_args=TINY, teacher_checkpoint=dense)
    with pytest.raises(ValueError, match=r"does not fit DeiT:(.|\n)*head"):
        build_objective(settings, build_model(settings, 6), "cpu")
