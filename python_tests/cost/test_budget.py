"""fit_budget against the paper's choices and against trying all sizes and keep rates."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest

import evit_ext
from evit_ext import fit_budget, models
from evit_ext.cost.budget import cost_of


def test_the_papers_choices() -> None:
    """Larger images, fewer patches, for what DeiT-S costs at 224 (Liang et al., ICLR 2022, section 4)."""
    found = {
        fit.img_size: (fit.keep_rate, f"{fit.macs / 1e9:.2f}") for fit in fit_budget("deit_small", 4.6e9)
    }
    paper = {256: (0.8, "4.61"), 272: (0.7, "4.56"), 288: (0.6, "4.50"), 304: (0.5, "4.44")}
    assert {size: found[size] for size in paper} == paper
    assert found.keys() == {224, 240, *paper} and found[224] == (1.0, "4.60")


def test_against_trying_everything() -> None:
    budget = 3e8
    rates = (0.9, 0.6, 0.3)
    found = fit_budget("deit_tiny", budget, rates, tolerance=0.0, depth=4, fuse_token=False)
    model = models.deit_tiny(drop_loc=None, depth=4, fuse_token=False, weight_init="skip")
    costs = {
        size: {rate: evit_ext.count_macs(evit_ext.set_keep_rate(model, rate), size) for rate in rates}
        for size in range(128, 304, 16)
    }
    best = {
        size: max((rate for rate in rates if cost[rate] <= budget), default=None)
        for size, cost in costs.items()
    }
    dense = max(size for size, rate in best.items() if rate == rates[0])
    expected = {size: rate for size, rate in best.items() if size >= dense and rate is not None}
    assert {fit.img_size: fit.keep_rate for fit in found} == expected
    assert set(expected.values()) == {*rates} and max(best) not in expected
    assert all(costs[fit.img_size][fit.keep_rate] == fit.macs for fit in found)
    assert all(one.macs >= other.macs for one, other in pairwise(found))


def test_sizes_are_multiples_of_the_patch_size() -> None:
    found = fit_budget("eva02_tiny_patch14_224", 1e9, (1.0, 0.5))
    assert found and all(fit.img_size % 14 == 0 for fit in found)


def test_cost_of_a_model_with_all_patches() -> None:
    assert f"{cost_of('deit_small') / 1e9:.2f}" == "4.60"
    assert f"{cost_of('dynamicvit_small') / 1e9:.2f}" == "4.74"
    assert f"{cost_of('resnet18') / 1e9:.2f}" == "1.81"
    assert fit_budget("deit_tiny", "deit_tiny", (1.0,)) == [(224, 1.0, cost_of("deit_tiny"))]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"macs": 0}, ValueError, "macs must be positive multiply-accumulates of one image, .* got 0"),
        ({"macs": math.nan}, ValueError, "got nan"),
        ({"macs": 1e15}, ValueError, r"at most 1e\+13, got 1000000000000000"),
        ({"macs": None}, TypeError, "a number of multiply-accumulates or a model's name, got None"),
        ({"macs": 1e9, "keep_rates": ()}, ValueError, "keep_rates must be some numbers"),
        ({"macs": 1e9, "keep_rates": (0.7, 1.2)}, ValueError, r"keep_rate must be in \(0, 1\], got 1.2"),
        ({"macs": 1e9, "tolerance": -0.1}, ValueError, r"tolerance must be in \[0, 1\]"),
        ({"macs": 1e9, "tolerance": 2}, ValueError, r"tolerance must be in \[0, 1\]"),
        ({"macs": 1e9, "model": "deit_smal"}, ValueError, "the nearest names are deit_small"),
        ({"macs": 1e9, "model": "resnet18"}, ValueError, "ResNet is not supported"),
        ({"macs": 100}, ValueError, "for an image of one patch, 16 pixels, more than the budget"),
    ],
)
def test_errors(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fit_budget(**{"model": "deit_tiny", **arguments})
