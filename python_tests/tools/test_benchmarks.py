"""benchmarks/operators.py: the rows as far as they go without a GPU, and the table."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
if not BENCHMARKS.exists():
    pytest.skip("tests run without the source tree", allow_module_level=True)
sys.path.insert(0, str(BENCHMARKS))

from operator_times import chains, cuda, facts  # noqa: E402

from evit_ext import ops  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(facts.MODELS, "tiny", (2, 12, 8))  # H, N, D
    monkeypatch.setattr(cuda, "PARTS_BATCH", 3)
    monkeypatch.setattr(cuda, "BACKEND", "aot_eager")
    with torch._functorch.config.patch(donated_buffer=False):  # which `measure` sets
        yield


def measure(
    dtype: torch.dtype = torch.float32, batch: int = 2, compiled: bool = False
) -> tuple[dict[str, Any], list[str]]:
    """All that does not depend on CUDA, with the host's clock."""
    rows, failures = cuda.measure(cuda.Measurement("tiny", batch, dtype, compiled, 0.0, 4000, "cpu"))
    return {row["operator"]: row for row in rows}, failures


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_are_checked_and_timed(dtype: torch.dtype) -> None:
    rows, failures = measure(dtype, batch=3)
    assert failures == []
    for name, row in rows.items():
        micro = row["microseconds"]
        assert {"copy", "ours, replayed", "ours, called", "eager, called"} <= set(micro)
        assert min(micro.values()) > 0
        assert ("eager, replayed" in micro) == (name == "attention_with_scores forward")
    # B = 3, H = 2, N = 12, D = 8, C = 16, K = 8, so 3 tokens are fused and 10 rows are left.
    size, batch = dtype.itemsize, 3
    q, k, scores, kept = batch * 16 * size, batch * 12 * 16 * size, batch * 12 * 4, batch * 8 * 8
    row_bytes = batch * 16 * size
    assert {name: row["bytes"] for name, row in rows.items()} == {
        "class_attention forward": q + k + scores,
        "class_attention backward": 2 * (q + k) + scores,
        "attention_with_scores forward": (3 + 1) * 12 * row_bytes + scores,
        "reorganize_tokens forward": (12 + 10) * row_bytes + scores + kept,
        "reorganize_tokens backward": (10 + 3 + 12) * row_bytes + 2 * scores + kept,
        "add_reorganize_norm forward": (24 + 20) * row_bytes + scores + kept + 2 * 16 * size,
        "gather_tokens forward": 2 * 8 * row_bytes + kept,
        "scatter_tokens forward": (8 + 12) * row_bytes + kept,
        "restore_tokens forward": 2 * 12 * row_bytes + kept,
        "fuse_tokens forward": (8 + 1) * row_bytes + batch * 8 * 4 + kept,
        # Of 11 patches 5 are merged away.
        "bipartite_matching forward": 11 * row_bytes + batch * (11 + 6) * 8,
        "merge_tokens forward": (12 + 7) * row_bytes + batch * (11 * 8 + 11 * 4 + 6 * 4),
        "merge_tokens backward": (12 + 10 + 7) * row_bytes + batch * (11 * 8 + 2 * 11 * 4),
    }
    assert len({line.count("|") for line in cuda.table(list(rows.values())).splitlines()}) == 1


def test_the_compiled_chain_is_a_candidate() -> None:
    rows, failures = measure(compiled=True)
    assert failures == [] and len(rows) == 6
    assert all(
        {"compiled, replayed", "compiled, called"} <= set(row["microseconds"]) for row in rows.values()
    )


@pytest.mark.parametrize(
    "name", ["class_attention", "attention_with_scores", "reorganize_tokens", "add_reorganize_norm"]
)
def test_a_wrong_chain_is_not_timed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = getattr(chains, name)

    def wrong(*arguments: Any) -> Any:
        result = right(*arguments)
        return (result[0].flip(1), *result[1:]) if isinstance(result, tuple) else result.flip(1)

    monkeypatch.setattr(chains, name, wrong)
    rows, failures = measure()
    assert failures[0].startswith(f"{name}: AssertionError: eager: off by")
    micro = rows[f"{name} forward"]["microseconds"]
    assert "ours, called" in micro and "eager, called" not in micro


def test_a_wrong_operator_has_no_row(monkeypatch: pytest.MonkeyPatch) -> None:
    right = ops.class_attention
    monkeypatch.setattr(ops, "class_attention", lambda q, k: right(q, k) + 1)
    rows, failures = measure()
    assert failures[0].startswith("class_attention forward: AssertionError: ours: off by 1.0")
    assert {"reorganize_tokens forward", "add_reorganize_norm forward"} <= set(rows)
    assert "class_attention forward" not in rows


def test_check_sees_nan_and_other_tokens() -> None:
    with pytest.raises(AssertionError, match="off by nan"):
        cuda.check("x", [torch.tensor([float("nan")])], [torch.ones(1)], 1.0)
    with pytest.raises(AssertionError, match="other tokens were kept"):
        cuda.check("x", [torch.tensor([1])], [torch.tensor([2])], 1.0)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / "operators.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "EVIT_COMMIT": "abc"})


def test_on_the_cpu(tmp_path: Path) -> None:
    """The command as it is documented, with what its results files have always held."""
    short = ("--models", "DeiT-S", "--dtypes", "float32", "--batch", "1", "--seconds", "0.01")
    done = run(*short, "--output", str(tmp_path / "sub" / "cpu"))
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "sub" / "cpu.json").read_text())
    assert list(results) == ["machine", "rows"] and results["machine"]["commit"] == "abc"
    (only,) = results["rows"]
    assert list(only) == ["model", "batch", "dtype", "microseconds", "gigabytes_per_second"]
    assert list(only["gigabytes_per_second"]) == ["copy", "class_attention", "reorganize_tokens"]
    text = (tmp_path / "sub" / "cpu.md").read_text()
    assert text.startswith("# Operators on the CPU\n\n- processor: ") and "| DeiT-S | 1 | float32 |" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_one_line_where_there_is_no_gpu() -> None:
    done = run("--device", "cuda")
    assert done.returncode == 1
    assert done.stderr == "there is no GPU: torch.cuda.is_available() is False\n"
