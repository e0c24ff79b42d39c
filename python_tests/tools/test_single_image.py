"""benchmarks/single_image.py: its lines add up."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from evit_ext.cpu import forward as cpu_forward
from evit_ext.ops import library

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import single_image


@pytest.mark.skipif(
    not cpu_forward.SUPPORTED or not cpu_forward._LINEAR_DTYPES or bool(library.TILED),
    reason="blocks run as a whole with oneDNN, AVX2 or newer and no tiles",
)
def test_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    stem = tmp_path / "single"
    options = ["--calls", "2", "--between", "1", "--precision", "float32", "--output", str(stem)]
    monkeypatch.setattr(sys, "argv", ["single_image.py", *options])
    single_image.main()
    found = json.loads(stem.with_suffix(".json").read_text())["found"]["float32"]
    whole = found.pop("the call, ms")
    parts = ["48 linear layers", "attention", "norms, reductions and head", "patches and positions"]
    summed = sum(found[f"{part}, ms"] for part in [*parts, "the rest of the call"])
    assert summed == pytest.approx(whole, abs=0.05)
    assert found["their GMACs"] == "2.78" and found["inside oneDNN's products, ms"] > 0
    assert "the rest of the call" in capsys.readouterr().out
    assert "their GMACs" in stem.with_suffix(".md").read_text()
