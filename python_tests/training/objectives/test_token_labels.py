"""The loss of token labelling: against the published one where every patch is kept, by hand where not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from evit_ext import models
from evit_ext.models.lvvit import TokenLabelOutput
from evit_ext.training import TokenLabelLoss

pytestmark = pytest.mark.usefixtures("one_thread")


def probabilities(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).softmax(-1)


def output(kept: list[list[int]], exchanged: list[int], total: int, classes: int = 3) -> TokenLabelOutput:
    """What a model would return that kept these patches, of which MixToken exchanged some."""
    patches = torch.tensor(kept)
    batch = len(patches)
    images = torch.tensor([[batch - 1 - b if k in exchanged else b for k in kept[b]] for b in range(batch)])
    logits = torch.randn(batch, classes, dtype=torch.float64, requires_grad=True)
    aux_logits = torch.randn(*patches.shape, classes, dtype=torch.float64, requires_grad=True)
    return TokenLabelOutput(logits, aux_logits, patches, images, torch.tensor(1 - len(exchanged) / total))


def slow_published_loss(out: TokenLabelOutput, exchanged: list[int], labels: Tensor, maps: Tensor) -> Tensor:
    """The published loss with every patch kept: the exchange of the auxiliary logits is undone first."""
    batch, total = len(labels), maps.shape[1]
    rows = []
    for b in range(batch):
        rows += [out.aux_logits[batch - 1 - b if k in exchanged else b, k] for k in range(total)]
    share = 1 - len(exchanged) / total
    loss = 0 * labels.sum()
    for b in range(batch):
        mixed = share * labels[b] + (1 - share) * labels[batch - 1 - b]
        loss = loss - (mixed * out.logits[b].log_softmax(0)).sum() / batch
    for row, label in zip(rows, maps.reshape(batch * total, -1), strict=True):
        loss = loss - 0.5 * (label * row.log_softmax(0)).sum() / (batch * total)
    return loss


@pytest.mark.parametrize("exchanged", [[], [1, 2, 4, 5]])
def test_the_published_loss_where_every_patch_is_kept(exchanged: list[int]) -> None:
    out = output([list(range(6))] * 4, exchanged, 6)
    labels, maps = probabilities(4, 3), probabilities(4, 6, 3, seed=1)
    expected = slow_published_loss(out, exchanged, labels, maps)
    loss = TokenLabelLoss()(out, labels, maps)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)  # the share is float32
    wrt = (out.logits, out.aux_logits)
    for a, b in zip(torch.autograd.grad(loss, wrt), torch.autograd.grad(expected, wrt), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("maps", [True, False])
def test_only_kept_patches_are_supervised(maps: bool) -> None:
    out = output([[0, 3, -1], [2, -1, -1]], [3], 4)
    labels = torch.tensor([0, 2])
    token_labels = probabilities(2, 4, 3) if maps else None

    def label(image: int, patch: int) -> Tensor:
        if token_labels is not None:
            return token_labels[image, patch]
        return F.one_hot(labels, 3)[image].double()

    def entropy(logits: Tensor, label: Tensor) -> Tensor:
        return -(label * logits.log_softmax(-1)).sum(-1)

    cls = sum(
        0.75 * F.cross_entropy(out.logits[b], labels[b])
        + 0.25 * F.cross_entropy(out.logits[b], labels[1 - b])
        for b in range(2)
    )
    aux = (
        entropy(out.aux_logits[0, 0], label(0, 0))
        + entropy(out.aux_logits[0, 1], label(1, 3))
        + entropy(out.aux_logits[1, 0], label(1, 2))
    )
    loss = TokenLabelLoss(dense_weight=0.3, cls_weight=0.8)(out, labels, token_labels)
    torch.testing.assert_close(loss, 0.8 * cls / 2 + 0.3 * aux / 3)
    loss.backward()
    fused = out.patches < 0
    assert (out.aux_logits.grad[fused] == 0).all() and (out.aux_logits.grad[~fused] != 0).all()


def test_without_token_labels_and_without_patches() -> None:
    out = output([[0, 1], [0, 1]], [], 2)
    labels = torch.tensor([1, 0])
    loss = TokenLabelLoss(dense_weight=0)(out, labels)
    torch.testing.assert_close(loss, F.cross_entropy(out.logits, labels))
    loss.backward()
    assert (out.aux_logits.grad == 0).all()
    out = output([[-1], [-1]], [], 2)
    torch.testing.assert_close(TokenLabelLoss()(out, labels), F.cross_entropy(out.logits, labels))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes(dtype: torch.dtype) -> None:
    out = output([[0, 1], [0, 1]], [], 2)
    low = out._replace(logits=out.logits.to(dtype), aux_logits=out.aux_logits.to(dtype))
    loss = TokenLabelLoss()(low, torch.tensor([1, 0]))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(
        loss.double(), TokenLabelLoss()(out, torch.tensor([1, 0])), rtol=0.01, atol=0.01
    )


def test_errors() -> None:
    loss, out = TokenLabelLoss(), output([[0, 1], [0, 1]], [], 2)
    with pytest.raises(TypeError, match="output must be the TokenLabelOutput .* got Tensor"):
        loss(out.logits, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"labels must be \[2\] or \[2, 3\], got \[2, 4\]"):
        loss(out, probabilities(2, 4))
    with pytest.raises(ValueError, match=r"labels must be \[2\] or \[2, 3\], got \[3, 3\]"):
        loss(out, torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match=r"token_labels must be \[2, patches, 3\], got \[2, 3, 4\]"):
        loss(out, probabilities(2, 3), probabilities(2, 3, 4))
    for weights in ((-1, 1), (0, 0), (float("nan"), 1)):
        with pytest.raises(ValueError, match="must not be negative and not both 0"):
            TokenLabelLoss(*weights)


@pytest.mark.parametrize("mix_token", [True, False])
def test_a_model_learns_labels_of_patches(mix_token: bool) -> None:
    """Patches are bright or dark, images mostly one or the other; no label would fit a wrong patch."""
    arguments: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 2}
    model = models.lvvit_small(keep_rate=0.7, num_classes=2, stem_dim=8, mix_token=mix_token, **arguments)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    loss_of = TokenLabelLoss()
    for _ in range(80):
        bright = torch.rand(16, 16) < torch.rand(16, 1)
        images = (2.0 * bright - 1).reshape(16, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
        images = images + 0.1 * torch.randn(16, 3, 32, 32)
        output = model(images)
        loss = loss_of(output, (bright.sum(dim=1) > 8).long(), F.one_hot(bright.long(), 2).float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    said = output.aux_logits.argmax(dim=2) == 1
    # Measured: 1; an answer that knows nothing of the patch but its image is right in 0.75.
    assert (said == bright[output.images, output.patches])[output.patches >= 0].float().mean() > 0.93
