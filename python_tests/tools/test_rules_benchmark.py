"""benchmarks/rules.py: that plain ToMe computes what the rule does, and the table's lines."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import timm
import torch

import evit_ext
from evit_ext.benchmark import Row
from evit_ext.tokens import ToMe

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
if not BENCHMARKS.exists():
    pytest.skip("tests run without the source tree", allow_module_level=True)
sys.path.insert(0, str(BENCHMARKS))

import rules as benchmark  # noqa: E402
from plain_tome import PlainToMe  # noqa: E402


@torch.no_grad()
def test_plain_tome_computes_the_same() -> None:
    """Where one block merges: it puts tokens into another order, by which later blocks would deal them."""
    torch.manual_seed(0)
    vit = timm.create_model("deit_tiny_patch16_224", img_size=64, depth=4).double().eval()
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    plain = PlainToMe(vit, 5, (1,))(images)
    evit_ext.apply(vit, rule=ToMe(r=5), drop_loc=(1,))
    torch.testing.assert_close(vit(images), plain, rtol=1e-10, atol=1e-10)


def test_lines() -> None:
    row = Row(
        model="ToMe r 13",
        keep_rate=None,
        gmacs=2.71,
        task="inference",
        mode="eager",
        precision="float32",
        batch=1,
        images_per_second=30.0,
        speedup=1.5,
        over_fastest=1.5,
        milliseconds=33.3,
        milliseconds_90=None,
        milliseconds_99=None,
        calls=9,
        peak_memory=None,
    )
    assert benchmark.cells(row) == ["ToMe r 13", "float32", "1", "30.0", "1.50x", "33.3", "–", "2.71"]
    attention = benchmark.attention_row(torch.float32, 1, 9, 2, 0.01)
    assert attention["tokens"] == 9 and attention["bias / plain"] > 0
