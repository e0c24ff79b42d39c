"""compare_costs against the published figures of both methods."""

from __future__ import annotations

import pytest

from evit_ext import compare_costs

# GMACs at keep rates 1.0 … 0.5. EViT's are the paper's; those of DynamicViT that are published are in
# models/test_dynamicvit.py, with one digit.
GMACS = {
    "EViT": ("4.60", "4.02", "3.48", "3.03", "2.64", "2.31"),
    "DynamicViT": ("4.74", "4.04", "3.46", "2.98", "2.56", "2.23"),
}
MILLIONS = {"EViT": "22.1", "DynamicViT": "22.8"}


def test_small() -> None:
    rows = compare_costs()
    assert [cost.keep_rate for cost, _ in rows] == [1.0, 0.9, 0.8, 0.7, 0.6, 0.5]
    for costs in zip(*rows, strict=True):
        name = costs[0].model
        assert all(cost.model == name for cost in costs)
        assert tuple(f"{cost.macs / 1e9:.2f}" for cost in costs) == GMACS[name]
        assert {f"{cost.parameters / 1e6:.1f}" for cost in costs} == {MILLIONS[name]}


def test_other_sizes() -> None:
    ((evit, dynamicvit),) = compare_costs("base", [0.7])
    assert f"{evit.macs / 1e9:.2f} {dynamicvit.macs / 1e9:.2f}" == "11.61 11.48"
    ((larger, _),) = compare_costs("base", [0.7], img_size=(224, 256))
    assert larger.macs > evit.macs and larger.parameters == evit.parameters + 14 * 2 * 768
    with pytest.raises(ValueError, match="size must be 'tiny', 'small' or 'base', got 'huge'"):
        compare_costs("huge")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"keep_rate must be in \(0, 1\], got 0"):
        compare_costs("tiny", [0])
