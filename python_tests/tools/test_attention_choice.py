"""benchmarks/attention_choice.py: its lines, and the exit status where the default is the slower choice."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from evit_ext.ops import library

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import attention_choice

pytestmark = pytest.mark.usefixtures("one_thread")


def test_slower_is_judged_by_the_other_choice() -> None:
    row: dict[str, Any] = {"PyTorch's ms": 0.5, "default ms": 1.0, "kernel ms": 1.0, "composed ms": 0.97}
    assert not attention_choice.is_slower(row, 0.05)
    assert attention_choice.is_slower({**row, "composed ms": 0.9}, 0.05)
    assert attention_choice.is_slower({**row, "default ms": 1.2, "composed ms": 1.2}, 0.05)


def test_lines_and_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["--seconds", "0.01", "--tokens", "9", "--batch-size", "1", "2", "--precision", "float32"]
    monkeypatch.setattr(
        sys, "argv", ["attention_choice.py", *arguments, "--output", str(tmp_path / "choice")]
    )
    before = library.TILED
    status = attention_choice.main()
    assert library.TILED is before
    found = json.loads((tmp_path / "choice.json").read_text())
    assert [(row["task"], row["batch"]) for row in found["rows"]] == [
        (task, batch) for task in ("inference", "training") for batch in (1, 2)
    ]
    assert status == int(bool(found["slower"]))
    assert "PyTorch's / default" in (tmp_path / "choice.md").read_text()
    assert torch.is_grad_enabled()
