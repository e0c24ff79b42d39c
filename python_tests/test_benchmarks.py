"""benchmarks/operators.py: the rows as far as they go without a GPU, the tables, and the targets."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
if not BENCHMARKS.exists():
    pytest.skip("tests run without the source tree", allow_module_level=True)
sys.path.insert(0, str(BENCHMARKS))

from operator_times import chains, clocks, cuda, facts, report, work  # noqa: E402
from time_limit import TimeLimit  # noqa: E402

from evit_ext import ops  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = (2, 12, 8)  # H, N, D


def aot_eager(function: Any) -> Any:
    return torch.compile(function, dynamic=False, backend="aot_eager")


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(facts.MODELS, "tiny", TINY)
    monkeypatch.setattr(work, "PARTS_BATCH", 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_are_checked_and_timed(dtype: torch.dtype) -> None:
    """All that does not depend on CUDA, with the host's clock."""
    torch._dynamo.reset()
    rows, failures = work.measure(clocks.WallClock(), "tiny", 3, dtype, "cpu", 0.0, 4000, None)
    assert failures == []
    kinds = [(row["operator"], row["direction"]) for row in rows]
    assert kinds == [
        ("class_attention", "forward"),
        ("class_attention", "backward"),
        ("attention_with_scores", "forward"),
        ("reorganize_tokens", "forward"),
        ("reorganize_tokens", "backward"),
        ("add_reorganize_norm", "forward"),
        ("stage", "forward"),
        ("gather_tokens", "forward"),
        ("scatter_tokens", "forward"),
        ("restore_tokens", "forward"),
        ("fuse_tokens", "forward"),
    ]
    for row in rows:
        micro = row["microseconds"]
        assert {"copy", "ours, replayed", "ours, called"} <= set(micro) and min(micro.values()) > 0
        assert ("eager, called" in micro) == (row["operator"] != "stage")
        assert ("eager, replayed" in micro) == (row["operator"] == "attention_with_scores")
    # B = 3, H = 2, N = 12, D = 8, C = 16, K = 8, so 3 tokens are fused and 10 rows are left.
    size, batch = dtype.itemsize, 3
    moved = {(row["operator"], row["direction"]): row["bytes"] for row in rows}
    q, k, scores, index = batch * 16 * size, batch * 12 * 16 * size, batch * 12 * 4, batch * 8 * 8
    row_bytes = batch * 16 * size
    assert moved["class_attention", "forward"] == q + k + scores
    assert moved["class_attention", "backward"] == 2 * (q + k) + scores
    assert moved["attention_with_scores", "forward"] == (3 + 1) * 12 * row_bytes + scores
    assert moved["reorganize_tokens", "forward"] == (12 + 10) * row_bytes + scores + index
    assert moved["reorganize_tokens", "backward"] == (10 + 3 + 12) * row_bytes + 2 * scores + index
    assert moved["add_reorganize_norm", "forward"] == (24 + 20) * row_bytes + scores + index + 2 * 16 * size
    assert moved["stage", "forward"] == q + k + (12 + 10) * row_bytes + 2 * scores + index
    assert moved["gather_tokens", "forward"] == 2 * 8 * row_bytes + index
    assert moved["scatter_tokens", "forward"] == (8 + 12) * row_bytes + index
    assert moved["restore_tokens", "forward"] == 2 * 12 * row_bytes + index
    assert moved["fuse_tokens", "forward"] == (8 + 1) * row_bytes + batch * 8 * 4 + index
    assert report.table(rows).count("\n") == 2 + len(rows)


def test_the_compiled_chain_is_a_candidate() -> None:
    torch._dynamo.reset()
    with torch._functorch.config.patch(donated_buffer=False):
        rows, failures = work.measure(clocks.WallClock(), "tiny", 2, torch.float32, "cpu", 0.0, 1, aot_eager)
    assert failures == []
    compared = {row["operator"] for row in rows if "compiled, replayed" in row["microseconds"]}
    assert compared == {
        "class_attention",
        "attention_with_scores",
        "reorganize_tokens",
        "add_reorganize_norm",
    }


@pytest.mark.parametrize(
    "name", ["class_attention", "attention_with_scores", "reorganize_tokens", "add_reorganize_norm"]
)
def test_a_wrong_chain_is_not_timed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = getattr(chains, name)

    def wrong(*arguments: Any) -> Any:
        result = right(*arguments)
        return (result[0].flip(1), *result[1:]) if isinstance(result, tuple) else result.flip(1)

    monkeypatch.setattr(chains, name, wrong)
    rows, failures = work.measure(clocks.WallClock(), "tiny", 2, torch.float32, "cpu", 0.0, 1, None)
    assert failures[0].startswith(f"{name} forward: AssertionError: eager: off by")
    (row,) = [row for row in rows if (row["operator"], row["direction"]) == (name, "forward")]
    assert "ours, called" in row["microseconds"] and "eager, called" not in row["microseconds"]


def test_a_wrong_operator_has_no_row(monkeypatch: pytest.MonkeyPatch) -> None:
    right = ops.class_attention
    monkeypatch.setattr(ops, "class_attention", lambda q, k: right(q, k) + 1)
    rows, failures = work.measure(clocks.WallClock(), "tiny", 2, torch.float32, "cpu", 0.0, 1, None)
    assert len(failures) == 2 and "class_attention forward: AssertionError: ours: off by 1.0" in failures[0]
    assert failures[1].startswith("attention_with_scores forward: AssertionError: eager: off by 1.0")
    assert {row["operator"] for row in rows} >= {"reorganize_tokens", "add_reorganize_norm"}
    assert ("class_attention", "forward") not in {(row["operator"], row["direction"]) for row in rows}


def test_check_sees_nan_and_other_tokens() -> None:
    with pytest.raises(AssertionError, match="off by nan"):
        work.check("x", [torch.tensor([float("nan")])], [torch.ones(1)], 1.0)
    with pytest.raises(AssertionError, match="other tokens were kept"):
        work.check("x", [torch.tensor([1])], [torch.tensor([2])], 1.0)


def row(operator: str, direction: str, batch: int, ours: float, **others: float) -> report.Row:
    """A made-up row in which 1 µs is 1 kB, so that GB/s is 1000 / ours, and 1000 of the copy."""
    taken = {"copy": 1e-6, "ours, replayed": ours / 1e6, "ours, called": 10 * ours / 1e6}
    taken |= {name.replace("_", ", "): value / 1e6 for name, value in others.items()}
    return work.row("DeiT-S", batch, torch.bfloat16, operator, direction, taken, 10**6, 10**6)


ROWS = [
    row("reorganize_tokens", "forward", 256, 1.0, eager_called=30.0, compiled_replayed=1.5),
    row("reorganize_tokens", "forward", 1, 1.0, eager_called=29.0, compiled_replayed=9.0),
    row("class_attention", "forward", 256, 1.4, eager_called=99.0, compiled_replayed=2.0),
    row("class_attention", "forward", 8, 50.0),
    row("stage", "forward", 1, 11.9),
    row("stage", "forward", 8, 40.0),
]


def test_targets() -> None:
    found = {target.name: target for target in report.targets(ROWS)}
    name = "reorganize_tokens forward, share of a copy's bandwidth, batch 256"
    assert (found[name].found, found[name].met) == ("100% (DeiT-S, batch 256)", True)
    name = "class_attention forward, share of a copy's bandwidth, batch 256"
    assert (found[name].wanted, found[name].found, found[name].met) == (
        "≥ 75%",
        "71% (DeiT-S, batch 256)",
        False,
    )
    name = "class_attention backward, share of a copy's bandwidth, batch 256"
    assert (found[name].found, found[name].met) == ("not measured", None)
    assert found["whole stage, batch 1, in a CUDA graph"].found == "11.9 µs (DeiT-S, batch 1)"
    assert found["whole stage, batch 1, in a CUDA graph"].met
    name = "reorganize_tokens forward, times faster than eager, both called"
    assert (found[name].found, found[name].met) == ("2.9 (DeiT-S, batch 1)", False)
    name = "reorganize_tokens forward, times faster than compiled, both replayed"
    assert (found[name].found, found[name].met) == ("1.5 (DeiT-S, batch 256)", True)
    name = "class_attention forward, times faster than compiled, both replayed"
    assert (found[name].found, found[name].met) == ("1.4 (DeiT-S, batch 256)", False)


def test_targets_are_for_bfloat16() -> None:
    other = [{**row, "dtype": "float32"} for row in ROWS]
    assert all(target.met is None for target in report.targets(other))


def test_verdict_and_tables() -> None:
    found = report.targets(ROWS)
    line = report.verdict(found)
    met = sum(target.met is True for target in found)
    assert line.startswith(f"targets met: {met} of {len(found)}; missed: class_attention forward, share")
    assert "; not measured: class_attention backward, share" in line and "\n" not in line
    whole, figures = report.summary(ROWS, 1000.0, ["a"], ["b"])
    assert whole.endswith(f"\nLeft out: a.\n\nFailed: b.\n\n{line}\n")
    assert json.loads(json.dumps(figures))["targets"][0]["met"] is True
    text = report.targets_table(found)
    assert text.count("| yes |") == met and text.count("| no |") == 3
    table = report.table(ROWS)
    assert "| DeiT-S | 256 | bfloat16 | reorganize_tokens forward | 1.0 | 1000 | 100% |" in table
    assert table.index("| DeiT-S | 1 | bfloat16 | reorganize") < table.index(
        "| DeiT-S | 256 | bfloat16 | reorg"
    )
    widths = {line.count("|") for line in table.splitlines()}
    assert len(widths) == 1


def test_interleaved_takes_turns() -> None:
    order: list[str] = []

    def timer(name: str, values: list[float]) -> clocks.Timer:
        def seconds() -> float:
            order.append(name)
            return values[len(order) // 2 % len(values)]

        return seconds

    taken = clocks.interleaved({"a": timer("a", [1.0]), "b": timer("b", [2.0])}, 0.0)
    assert order == ["a", "b"] * 5 and taken == {"a": 1.0, "b": 2.0}


class Stand:
    """In place of a GPU: every row takes so many seconds, of a clock that stands still otherwise."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, compiled: float, plain: float) -> None:
        self.now, self.rows, self.lost_after = 0.0, [], 99
        self.seconds = {True: compiled, False: plain}
        monkeypatch.setattr(cuda, "TimeLimit", lambda minutes: TimeLimit(minutes, lambda: self.now))
        monkeypatch.setattr(cuda, "CudaClock", lambda: SimpleNamespace(stream=None))
        monkeypatch.setattr(cuda, "copy_bandwidth", lambda *_: 4000.0)
        monkeypatch.setattr(cuda, "measure", self.measure)
        monkeypatch.setattr(cuda, "gpu_is_lost", lambda: "lost" if len(self.rows) > self.lost_after else "")
        monkeypatch.setattr(cuda._C, "build_info", lambda: {"cuda_operators": True})
        monkeypatch.setattr(cuda.library, "KERNEL_DEVICES", {"cuda"})
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)

    def measure(self, clock: Any, model: str, batch: int, *rest: Any) -> Any:
        self.now += self.seconds[rest[-1] is not None]
        self.rows.append((model, batch, rest[-1] is not None))
        return [row("stage", "forward", batch, 1.0)], []

    def run(self, limit: float) -> list[str]:
        wanted = (["DeiT-S", "DeiT-B"], [256, 1], [torch.bfloat16])
        results = cuda.run(*wanted, seconds=0.4, cache_bytes=1, limit=limit, on_progress=lambda results: None)
        assert len(results.rows) == len(self.rows) and results.bandwidth == 4000.0
        return results.left_out


def test_what_fits_is_measured_compiled_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """By what rows have taken, so that the last one does not outlast the limit."""
    donated = torch._functorch.config.donated_buffer
    try:
        gpu = Stand(monkeypatch, compiled=70.0, plain=20.0)
        left_out = gpu.run(170.0)
        assert gpu.rows == [("DeiT-S", 256, True), ("DeiT-S", 1, True), ("DeiT-B", 256, False)]
        assert left_out == [
            "DeiT-B, batch 1, torch.bfloat16: it would take about 20 s, and 10 s were left",
        ]
        gpu = Stand(monkeypatch, compiled=70.0, plain=10.0)
        assert gpu.run(125.0) == [
            "DeiT-S, batch 1, torch.bfloat16, compiled: it would take about 70 s, and 55 s were left"
        ]
        assert gpu.rows[1] == ("DeiT-S", 1, False) and gpu.now == 100.0
        gpu = Stand(monkeypatch, compiled=1.0, plain=1.0)
        gpu.lost_after = 0
        assert gpu.run(125.0) == [f"{rest}, torch.bfloat16: lost" for rest in REST]
    finally:
        torch._functorch.config.donated_buffer = donated


REST = ("DeiT-S, batch 1", "DeiT-B, batch 256", "DeiT-B, batch 1")


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
