"""Objectives: their losses against formulas in float64, whom their gradients reach, and that models learn."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import evit_ext
from evit_ext import models
from evit_ext.models.dynamicvit import DynamicViT
from evit_ext.models.lvvit import LVViT
from evit_ext.training import (
    Classification,
    Distillation,
    DynamicViTLoss,
    DynamicViTTraining,
    Guided,
    Objective,
    TokenLabelLoss,
    TokenLabelTraining,
)

pytestmark = pytest.mark.usefixtures("one_thread")

MICRO: dict[str, Any] = {
    "img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 2, "num_classes": 5,
    "drop_loc": None,
}  # fmt: skip


def lvvit(**arguments: Any) -> LVViT:
    return models.lvvit_small(**{**MICRO, "stem_dim": 6, **arguments}).train()


def dynamicvit() -> DynamicViT:
    return models.dynamicvit_small(**MICRO).train()


def batch(size: int = 4) -> tuple[Tensor, Tensor]:
    """Noise with a mean that tells the class."""
    labels = torch.arange(size) % 5
    return torch.randn(size, 3, 32, 32) * 0.3 + (labels[:, None, None, None] - 2.0), labels


def probabilities(*shape: int) -> Tensor:
    return torch.randn(shape).softmax(dim=-1)


def logarithms(logits: Tensor) -> Tensor:
    """Return log-probabilities in float64, by the definition."""
    logits = logits.detach().double()
    return logits - logits.exp().sum(dim=-1, keepdim=True).log()


def test_classification(small_vit: Any) -> None:
    model, (images, labels) = evit_ext.apply(small_vit(), 0.7), batch()
    logs = logarithms(model(images))
    own, mean = logs[torch.arange(4), labels], logs.mean(dim=1)
    soft = probabilities(4, 5)
    for criterion, targets, expected in (
        (nn.CrossEntropyLoss(), labels, -own.mean()),
        (LabelSmoothingCrossEntropy(0.1), labels, -(0.9 * own + 0.1 * mean).mean()),
        (SoftTargetCrossEntropy(), soft, -(soft.double() * logs).sum(dim=1).mean()),
    ):
        loss, logits = Classification(criterion)(model, images, targets)
        assert torch.equal(logits, model(images))
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def expected_distillation(
    logits: Tensor, distilled: Tensor, taught: Tensor, labels: Tensor, kind: str, alpha: float, tau: float
) -> float:
    rows = torch.arange(len(labels))
    base = -logarithms(logits)[rows, labels].mean()
    if kind == "hard":
        extra = -logarithms(distilled)[rows, taught.argmax(dim=1)].mean()
    else:
        ours, theirs = logarithms(distilled / tau), logarithms(taught / tau)
        extra = tau**2 * (theirs.exp() * (theirs - ours)).mean()
    return ((1 - alpha) * base + alpha * extra).item()


@pytest.mark.parametrize(
    ("kind", "alpha", "tau"), [("soft", 0.3, 1.0), ("soft", 0.9, 3.0), ("hard", 0.5, 1.0)]
)
def test_distillation(small_vit: Any, kind: Any, alpha: float, tau: float) -> None:
    torch.manual_seed(2)
    teacher, (images, labels) = small_vit(drop_path_rate=0.5).train(), batch()
    objective = Distillation(nn.CrossEntropyLoss(), teacher, kind, alpha, tau)
    taught = teacher(images)
    torch.manual_seed(3)
    plain = evit_ext.apply(small_vit(), 0.7).train()
    loss, logits = objective(plain, images, labels)
    assert torch.equal(logits, plain(images))
    expected = expected_distillation(logits, logits, taught, labels, kind, alpha, tau)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected, rel=1e-5)

    student = evit_ext.apply(small_vit(cls=VisionTransformerDistilled), 0.7).train()
    mean = student(images)
    loss, logits = objective(student, images, labels)
    own, distilled = student(images)
    assert not torch.equal(own, distilled)
    torch.testing.assert_close(logits, mean)
    expected = expected_distillation(own, distilled, taught, labels, kind, alpha, tau)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    # Evaluation is that of the mean, as before.
    torch.testing.assert_close(student.eval()(images), mean)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_what_the_heads_learn_from(small_vit: Any, alpha: float) -> None:
    student, teacher = small_vit(cls=VisionTransformerDistilled).train(), small_vit().train()
    images, labels = batch()
    objective = Distillation(nn.CrossEntropyLoss(), teacher, "soft", alpha)
    objective(student, images, labels).loss.backward()
    for head, learns in ((student.head, alpha < 1), (student.head_dist, alpha > 0)):
        assert bool(head.weight.grad.any()) == learns
    assert student.patch_embed.proj.weight.grad.any()
    assert not teacher.training
    assert all(not p.requires_grad and p.grad is None for p in teacher.parameters())


def test_dynamicvit() -> None:
    model, teacher, (images, labels) = dynamicvit(), VisionTransformer(**plain_arguments()), batch()
    losses = DynamicViTLoss(model.keep_ratios, teacher)
    torch.manual_seed(5)
    loss, logits = DynamicViTTraining(losses)(model, images, labels)
    torch.manual_seed(5)
    output = model(images)
    parts = losses.parts(output, images, labels)
    assert torch.equal(logits, output.logits) and torch.equal(loss, parts.total)
    rows = torch.arange(4)
    assert parts.classification.item() == pytest.approx(
        -logarithms(logits)[rows, labels].mean().item(), rel=1e-5
    )
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert all(parameter.grad is None for parameter in teacher.parameters())


def plain_arguments() -> dict[str, Any]:
    return {name: value for name, value in MICRO.items() if name != "drop_loc"}


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_token_labels(given: bool, smoothing: float) -> None:
    model, (images, labels) = lvvit(keep_rate=0.6), batch()
    maps = probabilities(4, 16, 5) if given else None
    objective = TokenLabelTraining(TokenLabelLoss(0.5, 0.8), smoothing)
    torch.manual_seed(4)
    loss, logits = objective(model, images, labels, maps)
    torch.manual_seed(4)
    output = model(images)
    assert torch.equal(logits, output.logits) and 0 < output.own_share < 1

    def smooth(label: Tensor) -> Tensor:
        return (1 - smoothing) * label.double() + smoothing / 5

    one_hot, share = smooth(torch.eye(5)[labels]), output.own_share.double()
    logs, patch_logs = logarithms(output.logits), logarithms(output.aux_logits)
    expected, patches = 0.0, []
    for b in range(4):
        expected -= 0.8 / 4 * ((share * one_hot[b] + (1 - share) * one_hot[3 - b]) * logs[b]).sum().item()
        for k, patch in enumerate(output.patches[b].tolist()):
            if patch >= 0:
                image = int(output.images[b, k])
                label = one_hot[image] if maps is None else smooth(maps[image, patch])
                patches.append(-(label * patch_logs[b, k]).sum().item())
    expected += 0.5 * sum(patches) / len(patches)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected, rel=1e-5)


def test_probabilities_are_not_smoothed_again() -> None:
    """As they come from mixup, which has smoothed them."""
    model, (images, _), soft = lvvit(), batch(), probabilities(4, 5)
    losses = []
    for smoothing in (0.0, 0.3):
        torch.manual_seed(5)
        losses.append(TokenLabelTraining(TokenLabelLoss(), smoothing)(model, images, soft).loss)
    assert torch.equal(*losses)


def guided(small_vit: Any, rate: float = 0.5) -> tuple[Any, Guided]:
    torch.manual_seed(2)
    oracle = evit_ext.Oracle(small_vit())
    torch.manual_seed(3)
    student = evit_ext.apply(small_vit(), rate).train()
    return student, Guided(Classification(nn.CrossEntropyLoss()), oracle)


def test_guided(small_vit: Any) -> None:
    student, objective = guided(small_vit)
    images, labels = batch()
    with objective.oracle.guide(student), evit_ext.record_tokens(student) as record:
        expected = student(images)
    with objective.step(student), evit_ext.record_tokens(student) as seen:
        loss, logits = objective(student, images, labels)
        loss.backward()
    assert torch.equal(logits, expected) and torch.equal(seen.kept[0], record.kept[0])
    assert not torch.equal(student(images), expected)
    assert all(parameter.grad is not None for parameter in student.parameters())
    assert all(parameter.grad is None for parameter in objective.oracle.parameters())
    with pytest.raises(RuntimeError, match="the oracle does not guide the model: have `with objective.step"):
        objective(student, images, labels)
    assert not any(name.startswith("oracle") for name in student.state_dict())


def test_guided_with_gradient_checkpointing(small_vit: Any) -> None:
    """The gradients of several forwards, each with its backward, are those without it."""
    gradients = []
    for checkpointing in (False, True):
        student, objective = guided(small_vit)
        student.set_grad_checkpointing(checkpointing)
        with objective.step(student):
            for seed in (0, 1):
                torch.manual_seed(seed)
                objective(student, *batch()).loss.backward()
        gradients.append([parameter.grad for parameter in student.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


def test_initialize(small_vit: Any) -> None:
    student, objective = guided(small_vit)
    Classification(nn.CrossEntropyLoss()).initialize(student)
    assert not torch.equal(student.head.weight, objective.oracle.vit.head.weight)
    objective.initialize(torch.compile(student, backend="eager"))
    for name, value in objective.oracle.vit.state_dict().items():
        assert torch.equal(student.state_dict()[name], value), name


def test_distributed_data_parallel(small_vit: Any, tmp_path: Path) -> None:
    """One process: what matters here is the wrapper."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        images, labels = batch()
        student, objective = guided(small_vit)
        distilled = evit_ext.apply(small_vit(cls=VisionTransformerDistilled), 0.7).train()
        distillation = Distillation(nn.CrossEntropyLoss(), small_vit(), "soft", 0.5)
        for model, minimised in ((student, objective), (distilled, distillation)):
            results = []
            for wrapped in (model, nn.parallel.DistributedDataParallel(model)):
                model.zero_grad()
                with minimised.step(wrapped):
                    loss, logits = minimised(wrapped, images, labels)
                    loss.backward()
                results.append([loss, logits, *(parameter.grad.clone() for parameter in model.parameters())])
            for plain, parallel in zip(*results, strict=True):
                torch.testing.assert_close(plain, parallel)
    finally:
        dist.destroy_process_group()


def test_guided_and_compiled(small_vit: Any) -> None:
    """A step of its own every time compiles nothing again."""
    torch.compiler.reset()
    student, objective = guided(small_vit)
    graphs = []

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(student, backend=count, dynamic=False)
    for seed in range(3):
        torch.manual_seed(seed)
        images, labels = batch()
        with objective.step(compiled):
            loss, logits = objective(compiled, images, labels)
            loss.backward()
            torch.testing.assert_close(logits, student(images))
        if seed == 0:
            once = len(graphs)
    assert len(graphs) == once > 0


CASES = ("classification", "soft", "hard", "distilled", "guided", "dynamicvit", "lvvit")


def case(name: str, small_vit: Any) -> tuple[nn.Module, Objective]:
    criterion, teacher = nn.CrossEntropyLoss(), small_vit()
    if name == "dynamicvit":
        model = dynamicvit()
        return model, DynamicViTTraining(DynamicViTLoss(model.keep_ratios, teacher))
    if name == "lvvit":
        return lvvit(keep_rate=0.6, mix_token=False), TokenLabelTraining(TokenLabelLoss(), 0.1)
    if name == "guided":
        return guided(small_vit)
    cls = VisionTransformerDistilled if name == "distilled" else VisionTransformer
    model = evit_ext.apply(small_vit(cls=cls), 0.6).train()
    if name == "classification":
        return model, Classification(criterion)
    return model, Distillation(criterion, teacher, "soft" if name == "soft" else "hard")


@pytest.mark.parametrize("name", CASES)
def test_learns(name: str, small_vit: Any) -> None:
    """Under bfloat16 autocast, as a Trainer runs it; teacher and oracle stay as they are."""
    model, objective = case(name, small_vit)
    other = getattr(objective, "teacher", getattr(objective, "oracle", None))
    before = None if other is None else copy.deepcopy(other.state_dict())
    keys = list(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    images, labels = batch(10)
    losses = []
    for _ in range(12):
        with objective.step(model):
            with torch.autocast("cpu", torch.bfloat16):
                loss, logits = objective(model, images, labels)
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
        losses.append(loss.item())
        assert loss.dtype == torch.float32 and logits.shape == (10, 5)
    # Measured: 0.72 of the first for the LV-ViT, which begins with small weights, at most 0.53 for others.
    assert losses[-1] < 0.85 * losses[0]
    assert list(model.state_dict()) == keys
    if other is not None and before is not None:
        assert all(torch.equal(value, before[key]) for key, value in other.state_dict().items())


def test_errors(small_vit: Any) -> None:
    images, labels = batch()
    criterion, model = nn.CrossEntropyLoss(), small_vit()
    with pytest.raises(ValueError, match="kind must be 'soft' or 'hard', got 'none'"):
        Distillation(criterion, model, "none")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"alpha must be in \[0, 1\], got 1.5"):
        Distillation(criterion, model, alpha=1.5)
    with pytest.raises(ValueError, match="tau must be positive, got 0"):
        Distillation(criterion, model, tau=0)
    with pytest.raises(ValueError, match=r"label_smoothing must be in \[0, 1\), got 1"):
        TokenLabelTraining(TokenLabelLoss(), 1)
    with pytest.raises(ValueError, match=r"agree in the shape of logits, got \(4, 5\) and \(4, 7\)"):
        Distillation(criterion, small_vit(num_classes=7))(model, images, labels)
    for objective in (Classification(criterion), Distillation(criterion, model)):
        with pytest.raises(
            TypeError, match="must return logits .* got TokenLabelOutput: .* TokenLabelTraining"
        ):
            objective(lvvit(), images, labels)
        with pytest.raises(ValueError, match="token_labels are for TokenLabelTraining"):
            objective(model, images, labels, probabilities(4, 16, 5))
    with pytest.raises(TypeError, match="must be the TokenLabelOutput .* got Tensor"):
        TokenLabelTraining(TokenLabelLoss())(model, images, labels)
    with pytest.raises(TypeError, match="DynamicViTOutput, got Tensor: is the model in training mode"):
        DynamicViTTraining(DynamicViTLoss((0.7,)))(dynamicvit().eval(), images, labels)
