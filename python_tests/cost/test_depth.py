"""fit_keep_rates against trying all shares."""

from __future__ import annotations

import math
from typing import Any

import pytest

import evit_ext
from evit_ext import fit_keep_rates
from evit_ext.cost.tokens import count_tokens
from evit_ext.models.by_name import create_evit

SMALL: dict[str, Any] = {"depth": 6, "embed_dim": 24, "num_heads": 2, "img_size": 64}

WEIGHTS = {
    "constant": [1, 1, 1, 1],
    "rising": [0.25, 0.5, 0.75, 1],
    "falling": [1, 0.75, 0.5, 0.25],
}


@pytest.mark.parametrize("shape", WEIGHTS)
@pytest.mark.parametrize(("rule", "least"), [("evit", 0.0), ("tome", 0.5)])
def test_against_trying_all(shape: str, rule: str, least: float) -> None:
    locations = (1, 2, 4, 5)
    model = create_evit("deit_tiny", drop_loc=locations, rule=rule, **SMALL)
    dense = evit_ext.count_macs(evit_ext.set_keep_rate(model, 1.0))
    shares = [
        [round(1 - step / 1000 * w, 4) for w in WEIGHTS[shape]]
        for step in range(1000)
        if all(1 - step / 1000 * w >= max(least, 1e-9) for w in WEIGHTS[shape])
    ]
    tried = [shares[len(shares) // 2], shares[-1]]
    for rates in tried:
        evit_ext.set_keep_rate(model, rates)
        budget = evit_ext.count_macs(model)
        found = fit_keep_rates("deit_tiny", budget, shape=shape, drop_loc=locations, rule=rule, **SMALL)
        # Equal costs: the largest keep rates of them.
        assert (found.drop_loc, found.macs) == (locations, budget)
        assert all(one >= other for one, other in zip(found.keep_rates, rates, strict=True))
        number = count_tokens(model, (64, 64))[-1]
        by_tokens = fit_keep_rates(
            "deit_tiny", tokens=number, shape=shape, drop_loc=locations, rule=rule, **SMALL
        )
        assert by_tokens.tokens == number and by_tokens.keep_rates >= found.keep_rates
    assert fit_keep_rates("deit_tiny", dense, shape=shape, rule=rule, **SMALL).keep_rates == (1.0,) * 3


def test_the_papers_schedule() -> None:
    found = fit_keep_rates("deit_small", 3.03e9)
    assert found.drop_loc == (3, 6, 9) and len(set(found.keep_rates)) == 1
    assert math.isclose(found.keep_rates[0], 0.7, abs_tol=0.005) and found.macs <= 3.03e9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"macs": 1e9, "shape": "bent"}, "shape must be one of 'constant', 'rising', 'falling', got 'bent'"),
        ({}, "give one budget, macs or tokens"),
        ({"macs": 1e9, "tokens": 9}, "give one budget"),
        ({"macs": math.nan}, "macs must be positive, got nan"),
        ({"tokens": True}, "tokens must be positive, got True"),
        ({"tokens": 1, "rule": "tome"}, r"too small for deit_tiny: .*needs 2 tokens at least"),
        ({"macs": 1.0}, "too small for deit_tiny: .* GMACs at least; let more blocks, or earlier ones"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit_keep_rates("deit_tiny", **arguments, **SMALL)
