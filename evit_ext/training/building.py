"""The model and the objective that a configuration asks for."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, cast

import torch
from timm.utils.model import unwrap_model
from torch import nn

from evit_ext._util.messages import shown
from evit_ext.cost.macs import count_macs
from evit_ext.models.by_name import create_dense, create_evit, takes_img_size
from evit_ext.models.dynamicvit import DynamicViT
from evit_ext.models.lvvit import LVViT
from evit_ext.patching.families import drop_locations, locate
from evit_ext.patching.oracle import Oracle
from evit_ext.training.config import TrainConfig
from evit_ext.training.objectives import (
    Classification,
    Distillation,
    DynamicViTLoss,
    DynamicViTTraining,
    Guided,
    Objective,
    TokenLabelLoss,
    TokenLabelTraining,
    build_criterion,
)
from evit_ext.weights import LoadedCheckpoint, load_checkpoint

#: Arguments of models that are fields of their own, by the field.
_FIELDS = {
    "img_size": "img_size",
    "num_classes": "num_classes",
    "pretrained": "pretrained",
    "keep_rate": "keep_rate",
    "drop_loc": "drop_loc",
    "fuse_token": "fuse_token",
    "drop_path_rate": "drop_path",
}

#: Arguments that a model which sees all patches does not have.
_OF_EVIT = ("keep_rate", "drop_loc", "fuse_token")


def build_model(config: TrainConfig, num_classes: int) -> nn.Module:
    """Return the model to be trained, an EViT or a DynamicViT; see :func:`load_initial` for its weights.

    Weights are drawn from torch's generator; seed it first. The model is on torch's default device, in
    training mode.

    Args:
        config: its fields of the model, and `keep_rate`.
        num_classes: number of logits, at least 1.

    Raises:
        TypeError: an argument that the model does not take.
        ValueError: there is no such model, it cannot be an EViT, or fields contradict each other.
        RuntimeError: pretrained weights could not be fetched.
    """
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, got {num_classes}")
    for name in config.model_args:
        if name in _FIELDS:
            raise ValueError(f"model_args: {name} is a field of its own, {_FIELDS[name]}")
    if config.pretrained and config.initial_checkpoint is not None:
        raise ValueError(
            "the model starts from its pretrained weights or from initial_checkpoint, not from both, got "
            f"pretrained and {shown(config.initial_checkpoint)}"
        )
    arguments: dict[str, Any] = {"num_classes": num_classes, "drop_path_rate": config.drop_path}
    if config.img_size is not None:
        arguments["img_size"] = config.img_size
    model: Any = create_evit(
        config.model,
        config.keep_rate,
        config.drop_loc,
        config.fuse_token,
        config.rule,
        config.rule_args,
        pretrained=config.pretrained,
        **arguments,
        **config.model_args,
    )
    if getattr(model, "num_classes", None) != num_classes:
        raise ValueError(
            f"{config.model} with {config.model_args} is a {type(model).__name__}, which has no logits of "
            f"{num_classes} classes to train on"
        )
    _check_img_size(model)
    if config.grad_checkpointing:
        model.set_grad_checkpointing(True)
    return model.train()


def gmacs_of_run(config: TrainConfig, num_classes: int, dense: bool = False) -> float:
    """Return the multiply-accumulates of an image, in 10^9, as it is configured or with all tokens."""
    if dense:
        config = replace(config, keep_rate=1.0, rule=None, rule_args={})
    with torch.device("meta"):
        model = build_model(replace(config, pretrained=False), num_classes)
    return count_macs(model.eval(), config.img_size) / 1e9


def _check_img_size(model: Any) -> None:
    """Raise ValueError unless images are whole patches, which timm would only notice at the first image."""
    embed = getattr(model, "patch_embed", None)
    size, patch = getattr(embed, "img_size", None), getattr(embed, "patch_size", None)
    if (
        size
        and patch
        and not getattr(embed, "dynamic_img_pad", False)
        and any(map(operator.mod, size, patch))
    ):
        shown = (" x ".join(map(str, sides)) for sides in (size, patch))
        raise ValueError(
            "img_size must be a multiple of the patches' size, got {} and {} pixels".format(*shown)
        )


def load_initial(config: TrainConfig, model: nn.Module) -> LoadedCheckpoint | None:
    """Give the model the weights of the configuration's `initial_checkpoint`; returns None if it has none.

    Position embeddings of another size are resized, and a head for other classes stays as it was.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the weights do not fit.
    """
    if config.initial_checkpoint is None:
        return None
    return load_checkpoint(model, config.initial_checkpoint, resize_pos_embed=True, resize_head=True)


def build_objective(config: TrainConfig, model: nn.Module, device: torch.device | str) -> Objective:
    """Return what a configuration minimises, with its teacher and oracle.

    At the start of a run, call its :meth:`Objective.initialize`, which copies an oracle's weights into the
    model; a resumed run has weights of its own. Call it before the model is sharded and before a moving
    average of it is made.

    Args:
        config: its fields of losses, of the recipe's targets and of the model.
        model: what :func:`build_model` returned, wrapped (DistributedDataParallel, torch.compile) or not.
        device: where the images will be.

    Raises:
        TypeError: an argument that the teacher or oracle does not take.
        ValueError: the model does not suit the requested losses, fields contradict each other, or weights do
            not fit.
        FileNotFoundError: there is no such checkpoint.
        RuntimeError: pretrained weights could not be fetched.
    """
    student = unwrap_model(model)
    _check(config, student)
    objective = _unguided(config, student, torch.device(device))
    if config.oracle is None:
        return objective
    vit = _other(config, "oracle", student, strict_head=False)
    depth, depth_of_oracle = (
        0 if found is None else len(found.blocks) for found in map(locate, (student, vit))
    )
    # A deeper or shallower oracle is asked at the quarters of its depth.
    oracle = Oracle(vit, drop_locations(student) if depth == depth_of_oracle else None)
    return Guided(objective, oracle.to(device))


def _unguided(config: TrainConfig, student: Any, device: torch.device) -> Objective:
    if isinstance(student, LVViT) and student.return_dense:
        return TokenLabelTraining(
            TokenLabelLoss(config.dense_weight, config.cls_weight), config.label_smoothing
        )
    criterion = build_criterion(config)
    teacher = None
    if config.teacher is not None:
        teacher = _other(config, "teacher", student, strict_head=True).requires_grad_(False).to(device)
    if isinstance(student, DynamicViT):
        loss = DynamicViTLoss(
            student.keep_ratios,
            teacher,
            criterion,
            ratio_weight=config.ratio_weight,
            distill_weight=config.distill_weight,
        )
        return DynamicViTTraining(loss)
    if teacher is None:
        return Classification(criterion)
    kind = cast(Literal["soft", "hard"], config.distillation)
    return Distillation(criterion, teacher, kind, config.distillation_alpha, config.distillation_tau)


def _check(config: TrainConfig, student: Any) -> None:
    """Raise ValueError for fields that contradict each other or the model."""
    for role in ("teacher", "oracle"):
        if getattr(config, role) is None and (
            getattr(config, f"{role}_args") or getattr(config, f"{role}_checkpoint") is not None
        ):
            article = "an" if role == "oracle" else "a"
            raise ValueError(f"{role}_args and {role}_checkpoint are of {article} {role}, but there is none")
    if config.oracle is not None and (config.pretrained or config.initial_checkpoint is not None):
        raise ValueError(
            "a model with an oracle starts from the oracle's weights: pretrained must be false and "
            "initial_checkpoint none (oracle_checkpoint has the oracle's weights)"
        )
    mixes = config.mixup > 0 or config.cutmix > 0
    problems: dict[str, bool]
    if isinstance(student, DynamicViT):
        problems = {
            "it chooses patches by its predictors: oracle must be none": config.oracle is not None,
            "its losses against a teacher are its own, see distill_weight: distillation must be 'none'": (
                config.distillation != "none"
            ),
            "it has no head for patches: token_labels must be none, or the model an LV-ViT": (
                config.token_labels is not None
            ),
            "its losses need training mode: eval_mode must be false": config.eval_mode,
            "its predictors learn the keep rate, which has no schedule: keep_rate_start_epoch and "
            "keep_rate_end_epoch must be 0": config.keep_rate_end_epoch > 0,
        }
    elif isinstance(student, LVViT) and student.return_dense:
        without = "or have model_args return_dense=False mix_token=False"
        problems = {
            f"it learns from token labels: distillation must be 'none', {without}": (
                config.distillation != "none"
            ),
            f"it learns from token labels: teacher must be none, {without}": config.teacher is not None,
            f"its losses need training mode: eval_mode must be false, {without}": config.eval_mode,
            "token labels are those of images that are not mixed: mixup and cutmix must be 0, MixToken takes "
            "their place": (mixes and config.token_labels is not None),
            "an oracle sees the images before MixToken mixes them: model_args must have mix_token=False, or "
            "oracle be none": config.oracle is not None and student.mix_token,
        }
    else:
        heads = hasattr(student, "set_distilled_training")
        problems = {
            "token_labels need an LV-ViT with an auxiliary head, such as lvvit_small: token_labels must be "
            "none": config.token_labels is not None,
            "it learns from a teacher by distillation: that must be 'soft' or 'hard', or teacher none": (
                config.teacher is not None and config.distillation == "none"
            ),
            "its heads for targets and for the teacher are apart in training mode only: eval_mode must be "
            "false, or distillation 'none'": heads and config.eval_mode and config.distillation != "none",
        }
    for problem, there in problems.items():
        if there:
            raise ValueError(f"{config.model} is a {type(student).__name__}: {problem}")


def _other(config: TrainConfig, role: str, student: Any, strict_head: bool) -> nn.Module:
    """Return the teacher or oracle, in eval mode, with its weights.

    Without `strict_head`, its logits are not used and may be untrained.
    """
    name: str = getattr(config, role)
    extra: Mapping[str, Any] = getattr(config, f"{role}_args")
    checkpoint: str | None = getattr(config, f"{role}_checkpoint")
    for argument in extra:
        if argument in _OF_EVIT:
            raise ValueError(f"{role}_args: the {role} sees all patches, it has no {argument}")
        if argument in ("num_classes", "pretrained"):
            raise ValueError(f"{role}_args: {argument} is not to be chosen: see {role}_checkpoint")
    arguments: dict[str, Any] = {"num_classes": student.num_classes}
    if config.img_size is not None and takes_img_size(name):
        arguments["img_size"] = config.img_size
    model: Any = create_dense(name, pretrained=checkpoint is None, **{**arguments, **extra})
    if checkpoint is not None:
        load_checkpoint(model, checkpoint, resize_pos_embed=True, resize_head=not strict_head)
    elif strict_head and (known := model.pretrained_cfg["num_classes"]) != student.num_classes:
        raise ValueError(
            f"the pretrained {role} {name} knows {known} classes, the model has {student.num_classes}: give "
            f"a {role}_checkpoint"
        )
    return model.eval()
