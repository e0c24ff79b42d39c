"""The ways to reduce tokens that are compared, each at the same two costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import timm
from torch import nn

import evit_ext
from evit_ext.tokens import EViT, RandomSelection, Rule, ToMe

MODEL = "vit_small_patch14_dinov2"
SIDE = 224  # pixels: 16 × 16 patches

#: EViT's keep rates in the paper's three blocks; what they cost is the budget of all others.
KEEP_RATES = (0.7, 0.5)

#: By EViT's keep rate, the first block of a schedule that drops late only; later ones save too little.
LATE = {0.7: 6, 0.5: 4}

#: The one that the others are compared with.
REFERENCE = "EViT"


@dataclass(frozen=True)
class Reduction:
    """A way to reduce tokens.

    Attributes:
        name: of its line in the tables.
        rule: one, or one for each of `drop_loc`.
        drop_loc: numbers of the blocks; None is the paper's three.
        gmacs: what a forward costs.
    """

    name: str
    rule: Rule | Sequence[Rule]
    drop_loc: Sequence[int] | None
    gmacs: float


def build() -> nn.Module:
    """Return the model, which has no head: its output is the class token's embedding."""
    return timm.create_model(MODEL, img_size=SIDE, num_classes=0).eval()


@cache
def reductions(keep_rate: float) -> list[Reduction]:
    """Return the reductions that cost as much as EViT with `keep_rate`, which is the first of them."""
    vit = build().to("meta")

    def made(name: str, rule: Rule | Sequence[Rule], drop_loc: Sequence[int] | None = None) -> Reduction:
        evit_ext.apply(vit, rule=rule, drop_loc=drop_loc)
        macs = evit_ext.count_macs(vit)
        evit_ext.remove(vit)
        return Reduction(name, rule, drop_loc, macs / 1e9)

    reference = made(REFERENCE, EViT(keep_rate))
    depth = len(vit.blocks)

    def fitted(name: str, shape: str, drop_loc: Sequence[int]) -> Reduction:
        fit = evit_ext.fit_keep_rates(
            MODEL, 1e9 * reference.gmacs, shape=shape, drop_loc=drop_loc, img_size=SIDE
        )
        return made(name, [EViT(rate) for rate in fit.keep_rates], fit.drop_loc)

    def merging(name: str, proportional: bool) -> Reduction:
        return nearest(
            reference.gmacs,
            lambda r: made(f"{name}, r = {r}", ToMe(r=r, proportional=proportional), range(depth)),
        )

    late = LATE[keep_rate]
    return [
        reference,
        made("normalized", EViT(keep_rate, fusion="normalized")),
        made("squeezed", EViT(keep_rate, fusion="squeezed")),
        made("dropped", EViT(keep_rate, fuse_token=False)),
        made("sum, with sizes", EViT(keep_rate, proportional=True)),
        made("normalized, with sizes", EViT(keep_rate, fusion="normalized", proportional=True)),
        made("squeezed, with sizes", EViT(keep_rate, fusion="squeezed", proportional=True)),
        fitted(f"the same share in blocks 1–{depth - 1}", "constant", range(1, depth)),
        fitted(f"rising over blocks 1–{depth - 1}", "rising", range(1, depth)),
        fitted(f"falling over blocks 1–{depth - 1}", "falling", range(1, depth)),
        fitted(f"late: blocks {late}–{depth - 1}", "constant", range(late, depth)),
        merging("ToMe", True),
        merging("ToMe without sizes", False),
        made("ToMe, three blocks", ToMe(keep_rate)),
        made("random", RandomSelection(keep_rate)),
    ]


def nearest(gmacs: float, made: Callable[[int], Reduction]) -> Reduction:
    """Return of ``made(1)``, ``made(2)``, …, which cost less and less, that nearest to `gmacs`."""
    last = made(1)
    for r in range(2, 100):
        current = made(r)
        if current.gmacs <= gmacs:
            return min(last, current, key=lambda reduction: abs(reduction.gmacs - gmacs))
        last = current
    raise ValueError(f"no number of merged tokens up to 99 costs {gmacs:.2f} GMACs")
