"""The table: aligned, and saying what the rows say."""

from __future__ import annotations

from typing import Any

import pytest

from evit_ext.demo.table import format_table


def row(**change: Any) -> dict[str, Any]:
    return {
        "model": "DeiT",
        "keep_rate": 1.0,
        "top1": 96.4187,
        "gmacs": 0.06521,
        "images_per_second": 1234.5,
        "speedup": 1.0,
        "object_patches_kept": [],
        "object_patches_kept_at_random": [],
        **change,
    }


def test_table() -> None:
    evit = row(
        model="EViT",
        keep_rate=0.7,
        speedup=1.456,
        object_patches_kept=[0.991, 0.9],
        object_patches_kept_at_random=[0.7, 0.5],
    )
    header, rule, dense, sparse = format_table([row(), evit]).splitlines()
    assert header.split("  ")[0] == "model"
    assert {len(header), len(rule), len(dense), len(sparse)} == {len(header)}
    assert dense.split() == ["DeiT", "1.00", "96.4", "0.0652", "1234", "1.00x", "-", "-"]
    assert sparse.split()[:6] == ["EViT", "0.70", "96.4", "0.0652", "1234", "1.46x"]
    assert "99% / 70%" in sparse
    assert sparse.endswith("90% / 50%")
    assert header.endswith("kept at stage 2")


def test_no_rows() -> None:
    with pytest.raises(ValueError, match="no row"):
        format_table([])
