"""Every line of docs/supported-models.md as ONNX."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from family_lines import LINES, Line

import evit_ext
from evit_ext.export import export_model


@pytest.mark.slow  # several minutes, for all that torch.onnx does for each
@pytest.mark.parametrize("line", LINES, ids=lambda line: line.name)
def test_onnx(line: Line, tmp_path: Path, onnx: Any, one_thread: None) -> None:
    """Writing it compares it with PyTorch."""
    vit = evit_ext.apply(line.build(**line.of_depth(2)), (0.7, 0.6), (0, 1))
    exported = export_model(vit, tmp_path / "a.onnx", "onnx", image_size=line.size)
    assert exported.max_difference < 1e-4
