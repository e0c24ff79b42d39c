"""Nearest neighbours, splits into index and queries, and intervals over the splits.

Notation: Q queries, I images of the index, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from study.statistics import Estimate, estimate

#: Neighbours that vote.
NEIGHBOURS = 5

#: Of each class, one image in so many is a query; the others are the index.
QUERIES = 3


def predict(queries: Tensor, index: Tensor, labels: Tensor, neighbours: int = NEIGHBOURS) -> Tensor:
    """Return the class of each query: that which most of its nearest neighbours have.

    Nearness is the cosine. Of classes with as many votes, the one whose votes have the larger sum of cosines.

    Args:
        queries: embeddings [Q, C].
        index: embeddings [I, C].
        labels: classes of the index, int64 [I], from 0.
        neighbours: how many vote, at most I.

    Returns:
        int64 [Q].
    """
    cosines = cosine(queries.unsqueeze(1), index.unsqueeze(0))
    best, which = cosines.topk(neighbours, dim=1)
    # One vote more is worth 4 · neighbours, and no cosines that differ by 2 each make up for it.
    votes = torch.zeros(len(queries), int(labels.max()) + 1, dtype=torch.float64)
    votes.scatter_add_(1, labels[which], 4 * neighbours + best)
    return votes.argmax(dim=1)


def cosine(one: Tensor, other: Tensor) -> Tensor:
    """Return the cosines along the last dimension, float64; the others broadcast."""
    first, second = (x.double() / x.double().norm(dim=-1, keepdim=True) for x in (one, other))
    return (first * second).sum(dim=-1)


def split(labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Deal the images of each class at random into index and queries.

    Args:
        labels: int64, of all images.
        seed: of the draw.

    Returns:
        The numbers of the images of the index, and of the queries: of a class with n images, n // `QUERIES`.
    """
    generator = torch.Generator().manual_seed(seed)
    index, queries = [], []
    for label in labels.unique():
        (members,) = torch.where(labels == label)
        members = members[torch.randperm(len(members), generator=generator)]
        count = len(members) // QUERIES
        queries.append(members[:count])
        index.append(members[count:])
    return torch.cat(index), torch.cat(queries)


def over_splits(values: Sequence[float], share: float) -> Estimate:
    """Return the mean of `values`, one for each split, with its interval.

    The splits share images, so their values are less different than those of new images would be. Student's
    t is therefore widened as by Nadeau and Bengio, "Inference for the Generalization Error" (Machine
    Learning 52, 2003): the variance of the mean of n values is taken as ``(1 / n + share) · s²``.

    Args:
        values: of the splits.
        share: number of queries, over the number of images in the index.
    """
    found = estimate(values)
    if found.runs < 2:
        return found
    half = (found.high - found.mean) * math.sqrt(1 + found.runs * share)
    return replace(found, low=found.mean - half, high=found.mean + half)
