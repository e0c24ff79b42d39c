"""A linear classifier on embeddings, and a short fine-tuning of a model with it."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

import evit_ext
from evit_ext.tokens import EViT

from .measuring import BATCH, embed, embed_reduced
from .neighbours import over_splits, split
from .pictures import Pictures
from .reductions import KEEP_RATES, Reduction

#: Of the fine-tuning: AdamW in bfloat16, a learning rate that rises for a tenth of the steps and falls to 0.
EPOCHS, LR, WEIGHT_DECAY = 2, 2e-5, 0.05


def fit_head(embeddings: Tensor, labels: Tensor) -> nn.Linear:
    """Return the logistic regression of `labels`, int64 [B], on embeddings [B, C]."""
    found = LogisticRegression(max_iter=5000).fit(embeddings.double().numpy(), labels.numpy())
    head = nn.Linear(embeddings.shape[1], len(found.classes_))
    with torch.no_grad():
        head.weight.copy_(torch.from_numpy(found.coef_))
        head.bias.copy_(torch.from_numpy(found.intercept_))
    return head


def fine_tune(
    vit: nn.Module, head: nn.Linear, images: Tensor, labels: Tensor, seed: int, epochs: int = EPOCHS
) -> None:
    """Train model and head in place on images [B, 3, H, W], half of them mirrored; they end in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    parameters = [*vit.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=WEIGHT_DECAY)
    steps = epochs * -(-len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=LR, total_steps=steps, pct_start=0.1)
    for _ in range(epochs):
        for batch in torch.randperm(len(images), generator=generator).split(BATCH):
            mirrored = torch.rand(len(batch), generator=generator) < 0.5
            given = torch.where(mirrored[:, None, None, None], images[batch].flip(3), images[batch])
            with torch.autocast("cpu", torch.bfloat16):
                loss = F.cross_entropy(head(vit(given)).float(), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


def top1(embeddings: Tensor, head: nn.Linear, labels: Tensor) -> float:
    """Return the share of embeddings [B, C] that the head gives their class, in percent."""
    with torch.no_grad():
        return 100 * (head(embeddings).argmax(dim=1) == labels).double().mean().item()


def measure(full: nn.Module, pictures: Pictures, splits: int, epochs: int = EPOCHS) -> dict[str, Any]:
    """Return top-1 of the queries, a line for each keep rate; a head learns from the index of its split.

    "head of the full model" is its logistic regression, "own head" that on the reduced model's embeddings,
    and "fine-tuned" trains all weights and the full model's head for `epochs`, with the tokens reduced.
    """
    rates = (1.0, *KEEP_RATES)
    before = {
        rate: embed_reduced(full, Reduction("EViT", EViT(rate), None, math.nan), pictures.images)[
            0
        ].embeddings
        for rate in rates
    }
    columns = ("head of the full model", "own head", "fine-tuned")
    found: dict[float, dict[str, list[float]]] = {rate: {name: [] for name in columns} for rate in rates}
    for seed in range(splits):
        index, queries = split(pictures.labels, seed)
        labels, wanted = pictures.labels[index], pictures.labels[queries]
        first = fit_head(before[1.0][index], labels)
        for rate in rates:
            own = fit_head(before[rate][index], labels)
            vit, head = copy.deepcopy(full), copy.deepcopy(first)
            evit_ext.apply(vit, keep_rate=rate)
            fine_tune(vit, head, pictures.images[index], labels, seed, epochs)
            tuned = embed(vit, pictures.images[queries]).embeddings
            values = (
                top1(before[rate][queries], first, wanted),
                top1(before[rate][queries], own, wanted),
                top1(tuned, head, wanted),
            )
            for name, value in zip(columns, values, strict=True):
                found[rate][name].append(value)
            print(
                f"split {seed}, keep rate {rate:g}: {', '.join(f'{value:.1f}' for value in values)} %",
                file=sys.stderr,
            )
    share = len(queries) / len(index)
    return {
        "index": len(index),
        "queries": len(queries),
        "splits": splits,
        "epochs": epochs,
        "rows": [
            {
                "keep rate": rate,
                **{name: _compared(found[rate][name], found[1.0][name], share) for name in columns},
            }
            for rate in rates
        ],
    }


def _compared(values: Sequence[float], full: Sequence[float], share: float) -> dict[str, Any]:
    differences = [one - other for one, other in zip(values, full, strict=True)]
    return {
        "values": list(values),
        "mean": asdict(over_splits(values, share)),
        "difference": asdict(over_splits(differences, share)),
    }
