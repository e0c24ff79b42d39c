"""Embeddings of the full and the reduced models, and what their neighbours say.

Notation: B images, L blocks, C channels.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import evit_ext
from evit_ext.tokens import EViT, RandomSelection, Rule

from . import drift
from .neighbours import cosine, over_splits, predict, split
from .pictures import Pictures
from .reductions import KEEP_RATES, Reduction, reductions

BATCH = 16

#: Forwards of a rule that draws random numbers; the splits take them in turn.
DRAWS = 2

#: Where the drift begins is asked of one picture in so many, as it takes many forwards.
EVERY = 8

#: What is counted in each split, in percent of the queries.
COUNTED = ("same index", "full index", "agreement", "agreement, full index")


class Embedded(NamedTuple):
    """What a model makes of a set of pictures.

    Attributes:
        embeddings: the class token after the last norm, [B, C].
        class_tokens: after each block, [L, B, C].
    """

    embeddings: Tensor
    class_tokens: Tensor


@torch.no_grad()
def embed(vit: nn.Module, images: Tensor) -> Embedded:
    """Run a model on images [B, 3, H, W]."""
    embeddings, tokens = [], []
    for batch in images.split(BATCH):
        with drift.class_tokens(vit) as found:
            embeddings.append(vit(batch))
        tokens.append(torch.stack(found))
    return Embedded(torch.cat(embeddings), torch.cat(tokens, dim=1))


def embed_reduced(vit: nn.Module, reduction: Reduction, images: Tensor) -> list[Embedded]:
    """Run a model with a reduction, `DRAWS` times if that draws; the model is left as it was."""
    evit_ext.apply(vit, rule=reduction.rule, drop_loc=reduction.drop_loc)
    found = []
    for seed in range(DRAWS if getattr(reduction.rule, "draws", False) else 1):
        torch.manual_seed(seed)
        found.append(embed(vit, images))
    evit_ext.remove(vit)
    return found


def by_split(
    draws: Sequence[Embedded], full: Embedded, labels: Tensor, splits: int
) -> dict[str, list[float]]:
    """Return `COUNTED`, a value for each split.

    "same index" is the share of the queries that their neighbours in an index of the same model give the
    right class, "full index" the same in an index of the full model. "agreement" is the share that they give
    the class which the full model finds in its own index, right or wrong.
    """
    counted: dict[str, list[float]] = {name: [] for name in COUNTED}
    for seed in range(splits):
        index, queries = split(labels, seed)
        own = draws[seed % len(draws)].embeddings
        expected = predict(full.embeddings[queries], full.embeddings[index], labels[index])
        same = predict(own[queries], own[index], labels[index])
        mixed = predict(own[queries], full.embeddings[index], labels[index])
        pairs = ((same, labels[queries]), (mixed, labels[queries]), (same, expected), (mixed, expected))
        for name, (one, other) in zip(COUNTED, pairs, strict=True):
            counted[name].append(100 * (one == other).double().mean().item())
    return counted


def with_intervals(
    counted: Mapping[str, Sequence[float]], reference: Mapping[str, Sequence[float]], share: float
) -> dict[str, Any]:
    """Return the means with intervals, and those of the differences to `reference`, paired by split."""
    found: dict[str, Any] = {}
    for name, values in counted.items():
        against = [a - b for a, b in zip(values, reference[name], strict=True)]
        found[name] = {
            "values": [round(value, 3) for value in values],
            "mean": asdict(over_splits(values, share)),
            "difference": asdict(over_splits(against, share)),
        }
    return found


def cosines(draws: Sequence[Embedded], full: Embedded) -> dict[str, Any]:
    """Return the mean cosines to the full model's class token, block by block, and to its embedding."""
    blocks = torch.stack([drift.by_block(drawn.class_tokens, full.class_tokens) for drawn in draws])
    last = torch.stack([drift.by_block(drawn.embeddings[None], full.embeddings[None]) for drawn in draws])
    return {"by block": blocks.mean(dim=0).tolist(), "embedding": last.mean().item()}


def shift(reduced: Tensor, full: Tensor, labels: Tensor, splits: int) -> dict[str, Any]:
    """Return how much of the drift of embeddings is one vector, the same for all pictures.

    Args:
        reduced, full: embeddings by the two models, [B, C]; their lengths do not count.
        labels, splits: as for :func:`by_split`.

    Returns:
        "share" of the drift's mean square that is that vector's, and what neighbours find in percent in the
        "full index" if the vector is subtracted from the queries, a value for each split.
    """
    reduced, full = (F.normalize(embeddings, dim=1) for embeddings in (reduced, full))
    drifted = reduced - full
    common = drifted.mean(dim=0)
    found = []
    for index, queries in (split(labels, seed) for seed in range(splits)):
        predicted = predict((reduced - common)[queries], full[index], labels[index])
        found.append(round(100 * (predicted == labels[queries]).double().mean().item(), 3))
    share = common.square().sum() / drifted.square().sum(dim=1).mean()
    return {"share": share.item(), "full index": found}


def between(embeddings: Tensor) -> dict[str, float]:
    """Return the cosines between embeddings [B, C] of different pictures: mean, 5th and 95th percentile."""
    one, other = torch.triu_indices(len(embeddings), len(embeddings), offset=1)
    cosines = cosine(embeddings[one], embeddings[other])
    low, high = cosines.quantile(cosines.new_tensor([0.05, 0.95])).tolist()
    return {"mean": cosines.mean().item(), "5 %": low, "95 %": high}


def measure(full: nn.Module, pictures: Pictures, splits: int) -> dict[str, Any]:
    """Return the figures of one set of pictures, as JSON can hold them."""
    images, labels, classes, rule = pictures
    index, queries = split(labels, 0)
    share = len(queries) / len(index)
    expected = embed(full, images)
    dense = by_split([expected], expected, labels, splits)
    budgets = []
    for keep_rate in KEEP_RATES:
        lines: list[dict[str, Any]] = []
        reference: dict[str, list[float]] = {}
        for reduction in reductions(keep_rate):
            print(f"{len(images)} pictures, keep rate {keep_rate:g}: {reduction.name}", file=sys.stderr)
            draws = embed_reduced(full, reduction, images)
            counted = by_split(draws, expected, labels, splits)
            reference = reference or counted  # the first
            facts: dict[str, Any] = {"name": reduction.name, "gmacs": reduction.gmacs, "forwards": len(draws)}
            facts["percent"] = with_intervals(counted, reference, share)
            facts["cosine"] = cosines(draws, expected)
            facts["shift"] = shift(draws[0].embeddings, expected.embeddings, labels, splits)
            lines.append(facts)
        budgets.append(
            {"keep rate": keep_rate, "rows": lines, "drift": causes(full, images[::EVERY], keep_rate)}
        )
    return {
        "rule": rule,
        "classes": classes,
        "images": len(images),
        "index": len(index),
        "queries": len(queries),
        "splits": splits,
        "between pictures": between(expected.embeddings),
        "full": {
            "gmacs": evit_ext.count_macs(full) / 1e9,
            "percent": with_intervals(dense, dense, share),
        },
        "budgets": budgets,
    }


@torch.no_grad()
def causes(full: nn.Module, images: Tensor, keep_rate: float) -> dict[str, Any]:
    """Return where the drift of EViT's embedding begins, in the paper's three blocks; see `drift`."""
    torch.manual_seed(0)
    stages = (3, 6, 9)
    parts: list[dict[str, Any]] = []
    for batch in images.split(BATCH):
        watched = drift.watch(full, batch)
        norms = watched.norms[:, :, 1:]
        found: dict[str, Any] = {
            "images": len(batch),
            "largest norm over median": (norms.amax(2) / norms.median(2).values).mean(1).tolist(),
        }
        rules: dict[str, Rule] = {
            "EViT's": EViT(keep_rate, fuse_token=False),
            "random": RandomSelection(keep_rate),
        }
        for name, rule in rules.items():
            kept = drift.kept_by(full, batch, rule, stages)
            found[f"{name}: cosine if what was dropped is hidden from"] = drift.masked(
                full, batch, stages, kept, watched
            )
            found[f"{name}: attention kept"] = drift.attention_kept(watched, stages, kept, 1)
        for fusion in ("sum", "normalized"):
            found[f"fused tokens, {fusion}"] = drift.fused_tokens(
                full, batch, EViT(keep_rate, fusion=fusion), stages, watched
            )
        parts.append(found)
    mean: dict[str, Any] = drift.averaged(parts)
    return mean
