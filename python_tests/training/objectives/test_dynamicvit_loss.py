"""DynamicViT's losses against their formulas, written out, and a model that learns from them."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from evit_ext import models
from evit_ext.models.dynamicvit import DynamicViTOutput
from evit_ext.training import DynamicViTLoss, DynamicViTTraining, Precision, Recipe, Trainer, evaluate
from evit_ext.training.objectives.dynamicvit import logits_loss, ratio_loss, token_loss

pytestmark = pytest.mark.usefixtures("one_thread")

MICRO: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 24,
    "depth": 4,
    "num_heads": 2,
    "num_classes": 5,
}


def output(batch: int = 3, patches: int = 16) -> DynamicViTOutput:
    decisions = [(torch.rand(batch, patches) < share).float() for share in (0.8, 0.5, 0.4)]
    return DynamicViTOutput(
        torch.randn(batch, 5), torch.randn(batch, patches, 24), decisions[-1], tuple(decisions)
    )


def test_ratio_loss() -> None:
    out = output()
    expected = 0.0
    for kept, ratio in zip(out.decisions, (0.7, 0.49, 0.343), strict=True):
        for row in kept.tolist():
            expected += (sum(row) / 16 - ratio) ** 2 / 3 / 3
    assert ratio_loss(out.decisions, (0.7, 0.49, 0.343)).item() == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="expected decisions of 2 stages, got 3"):
        ratio_loss(out.decisions, (0.7, 0.49))


def kl(theirs: Tensor, ours: Tensor) -> float:
    p, q = theirs.double().softmax(dim=0), ours.double().softmax(dim=0)
    return sum(a * (a / b).log() for a, b in zip(p, q, strict=True)).item()


def test_logits_loss() -> None:
    ours, theirs = torch.randn(2, 3, 5)
    expected = sum(kl(theirs[b], ours[b]) for b in range(3)) / 3
    assert logits_loss(ours, theirs).item() == pytest.approx(expected, rel=1e-5)
    assert logits_loss(ours, ours).item() == 0


@pytest.mark.parametrize("distance", ["mse", "kl"])
def test_token_loss(distance: Any) -> None:
    out, teacher = output(), torch.randn(3, 16, 24)
    distances = []
    for b, n in out.mask.nonzero().tolist():
        if distance == "mse":
            distances.append((out.tokens[b, n] - teacher[b, n]).square().mean().item())
        else:
            distances.append(kl(teacher[b, n], out.tokens[b, n]))
    got = token_loss(out.tokens, teacher, out.mask, distance).item()
    assert got == pytest.approx(sum(distances) / len(distances), rel=1e-5)
    assert token_loss(out.tokens, teacher, torch.zeros(3, 16), distance).item() == 0


@pytest.mark.parametrize("distance", ["mse", "kl"])
def test_total(distance: Any) -> None:
    teacher = timm.create_model("deit_tiny_patch16_224", **MICRO, reg_tokens=1)
    loss = DynamicViTLoss((0.7, 0.49, 0.343), teacher, token_distance=distance)
    assert not teacher.training and list(loss.parameters()) == [] and loss.state_dict() == {}
    images, targets, out = torch.randn(3, 3, 32, 32), torch.tensor([0, 4, 2]), output()
    parts = loss.parts(out, images, targets)
    features = teacher.forward_features(images)
    assert parts.classification.item() == pytest.approx(
        torch.nn.functional.cross_entropy(out.logits, targets).item()
    )
    assert parts.logits.item() == pytest.approx(logits_loss(out.logits, teacher(images)).item())
    assert parts.tokens.item() == pytest.approx(
        token_loss(out.tokens, features[:, 2:], out.mask, distance).item()
    )
    expected = parts.classification + 2 * parts.ratio + 0.5 * parts.logits + 0.5 * parts.tokens
    assert parts.total.item() == pytest.approx(expected.item())
    assert loss(out, images, targets).item() == parts.total.item()
    weighted = DynamicViTLoss((0.7, 0.49, 0.343), teacher, None, 3.0, 0.25, distance)
    expected = parts.classification + 3 * parts.ratio + 0.25 * (parts.logits + parts.tokens)
    assert weighted(out, images, targets).item() == pytest.approx(expected.item())
    alone = DynamicViTLoss((0.7, 0.49, 0.343)).parts(out, images, torch.eye(5)[targets])
    assert (alone.logits.item(), alone.tokens.item()) == (0, 0)
    assert alone.classification.item() == pytest.approx(parts.classification.item())
    assert alone.total.item() == pytest.approx((parts.classification + 2 * parts.ratio).item())


def test_errors() -> None:
    images, targets = torch.randn(3, 3, 32, 32), torch.tensor([0, 4, 2])
    with pytest.raises(ValueError, match="token_distance must be 'mse' or 'kl', got 'l1'"):
        DynamicViTLoss((0.7,), token_distance="l1")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="keep_ratios must have a number for each stage"):
        DynamicViTLoss(())
    with pytest.raises(TypeError, match="got Tensor: is the model in training mode"):
        DynamicViTLoss((0.7, 0.5, 0.3))(torch.zeros(3, 5), images, targets)  # type: ignore[arg-type]
    dropping = models.deit_tiny(**MICRO, keep_rate=0.5, drop_loc=None)
    with pytest.raises(ValueError, match=r"shape of tokens, got \(3, 16, 24\) and \(3, 4, 24\)"):
        DynamicViTLoss((0.7, 0.5, 0.3), dropping)(output(), images, targets)


def test_gradients_reach_everything_but_the_teacher() -> None:
    model = models.dynamicvit_tiny(**MICRO, drop_loc=None).train()
    teacher = timm.create_model("deit_tiny_patch16_224", **MICRO)
    loss = DynamicViTLoss(model.keep_ratios, teacher)
    images = torch.randn(3, 3, 32, 32)
    loss(model(images), images, torch.tensor([0, 4, 2])).backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_the_trainer_trains_a_dynamicvit() -> None:
    """It learns the classes, and to keep as many patches as it shall."""
    labels = torch.arange(80) % 5
    images = torch.randn(80, 3, 32, 32) * 0.3 + (labels[:, None, None, None] - 2.0)
    batches = list(zip(images.split(16), labels.split(16), strict=True))
    model = models.dynamicvit_tiny(**MICRO, drop_loc=None, keep_rate=0.6)
    teacher = timm.create_model("deit_tiny_patch16_224", **MICRO)
    recipe = Recipe(epochs=60, batch_size=16, lr=5e-3, warmup_epochs=1)
    float32 = Precision(torch.float32, "test")
    loss = DynamicViTLoss(model.keep_ratios, teacher, ratio_weight=10.0, distill_weight=0.02)
    trainer = Trainer(model, recipe, len(batches), precision=float32, objective=DynamicViTTraining(loss))
    first, *_, last = [trainer.train_one_epoch(batches, progress=False) for _ in range(recipe.epochs)]
    assert last.loss < 0.6 * first.loss and last.accuracy > 80
    with torch.no_grad():
        shares = [kept.mean().item() for kept in model.train()(images).decisions]
    assert shares == pytest.approx(model.keep_ratios, abs=0.12)
    assert evaluate(model, batches, float32).top1 > 80
