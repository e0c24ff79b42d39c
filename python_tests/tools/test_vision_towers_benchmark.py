"""benchmarks/vision_towers.py: what it measures, on a small model, and its tables."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="transformers is not installed")
BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
if not BENCHMARKS.exists():
    pytest.skip("tests run without the source tree", allow_module_level=True)
sys.path.insert(0, str(BENCHMARKS))

import vision_towers as benchmark  # noqa: E402


def test_small_model() -> None:
    tower = {**benchmark.TOWER, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4}
    tower |= {"num_attention_heads": 2, "image_size": 336}
    text = {**benchmark.TEXT, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 2}
    rows = benchmark.measure(tower, text, rounds=2)
    # 576, a third of them, and 0.7 and 0.5 of them at blocks 1 and 2 with a fused token.
    assert [row["tokens"] for row in rows["tower"]] == [576, 192, 285, 146]
    gmacs = [row["gmacs"] for row in rows["tower"]]
    assert gmacs[0] > gmacs[1] > gmacs[2] > gmacs[3]
    assert [row["image_tokens"] for row in rows["prefill"]] == [576, 192, 64]
    assert benchmark.table(rows).count("\n| ") == 4 + 1 + 3
