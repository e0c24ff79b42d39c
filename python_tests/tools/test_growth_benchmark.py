"""benchmarks/growth.py: what it measures, its fits, its files; and that an EViT's memory has no N² in it."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
if not BENCHMARKS.exists():
    pytest.skip("tests run without the source tree", allow_module_level=True)
sys.path.insert(0, str(BENCHMARKS))

import growth  # noqa: E402


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / "growth.py"), *arguments]
    environment = {**os.environ, "EVIT_COMMIT": "abc", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_the_command(tmp_path: Path) -> None:
    stem = tmp_path / "sub" / "growth-cpu"
    sizes = ("--img-size", "32", "64", "--batch", "1", "--precision", "float32")
    done = run("--model", "tiny", *sizes, "--seconds", "0.01", "--output", str(stem))
    assert done.returncode == 0, done.stderr
    assert "[2/2, " in done.stdout and "17 tokens, batch 1, float32, 4 models" in done.stdout
    results = json.loads(stem.with_suffix(".json").read_text())
    assert list(results) == ["machine", "left_out", "failures", "rows", "fits"]
    assert results["machine"]["commit"] == "abc"
    sizes_of_rows = [(row["tokens"], row["batch"]) for row in results["rows"]]
    assert sizes_of_rows == [(5, 1)] * 4 + [(17, 1)] * 4
    for row in results["rows"]:
        assert row["milliseconds"] > 0 and row["calls"] >= growth.LEAST
        assert row["peak_memory"] is None or row["peak_memory"] > 0
    assert [fit["model"] for fit in results["fits"]] == ["dense", "EViT 0.7", "EViT 0.5", "plain EViT 0.7"]
    text = stem.with_suffix(".md").read_text()
    assert text.startswith("# Growth of DeiT-T's time and memory\n\n- processor: ")
    assert "| EViT 0.5 | float32 | 1 | 64 | 17 |" in text
    assert stem.with_suffix(".png").stat().st_size > 20_000


def options(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> argparse.Namespace:
    monkeypatch.setattr(sys, "argv", ["growth.py", *arguments])
    return growth.parse()


def test_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = growth.groups(options(monkeypatch))
    sizes = [(growth.tokens(group.setups[0].side), group.setups[0].batch) for group in groups]
    tokens = [(n, 1) for n in (197, 401, 577, 785, 1025, 2305, 4097)]
    assert sizes == 2 * (tokens + [(197, batch) for batch in (4, 16)])
    kinds = [(setup.kind, setup.keep_rate) for setup in groups[0].setups]
    assert kinds == [("dense", 1.0), ("EViT", 0.7), ("EViT", 0.5), ("plain EViT", 0.7)]
    quick = growth.groups(options(monkeypatch, "--quick"))
    assert len(quick) == 3 and {setup.keep_rate for group in quick for setup in group.setups} == {1.0, 0.7}


def test_an_image_that_does_not_divide(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        options(monkeypatch, "--img-size", "100")
    assert "multiples of 16, got 100" in capsys.readouterr().err


def rows(memory: Any) -> list[dict[str, Any]]:
    return [
        {
            **{
                "kind": "EViT",
                "keep_rate": 0.7,
                "precision": "float32",
                "batch": 1,
                "side": side,
                "calls": 3,
            },
            **{"tokens": growth.tokens(side), "milliseconds": growth.tokens(side) ** 1.5},
            "peak_memory": memory(growth.tokens(side)),
        }
        for side in growth.SIDES
    ]


def test_fits() -> None:
    (line,) = growth.fits(rows(lambda n: 2048 * n + 10**6))
    assert line["bytes_per_token"] == pytest.approx(2048) and line["residual"] < 1e-6
    assert line["quadratic_share"] == pytest.approx(0, abs=1e-6) and 0.5 < line["memory_exponent"] < 1
    assert line["time_exponent"] == pytest.approx(1.5)
    (square,) = growth.fits(rows(lambda n: 6 * n * n + 1000 * n))
    assert square["quadratic_share"] == pytest.approx(6 * 4097 / (6 * 4097 + 1000), rel=1e-6)
    assert square["memory_exponent"] > 1.8 and square["residual"] > 0.3
    (unknown,) = growth.fits(rows(lambda n: None))
    assert unknown["memory_exponent"] is None and unknown["sizes"] == 7
    assert "| – | – | – | – | 1.50 |" in growth.fits_table([unknown])


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux counts a peak anew")
def test_memory_is_linear_in_tokens(one_thread: None) -> None:
    """At 2,305 tokens what 577 and 1,025 let expect; an attention map of all heads would be 61 MiB more."""

    def measured(kind: str, side: int) -> int:
        setup = growth.Setup("tiny", kind, 0.7, side, 1, "float32", "cpu", 1)
        added = growth.memory(setup)
        assert added is not None
        return added

    small, large = (measured("EViT", side) for side in (384, 512))
    expected = large + (large - small) * (2305 - 1025) / (1025 - 577)
    found = measured("EViT", 768)
    assert found < 1.2 * expected, (small, large, found)
    # And one that has such a map is seen.
    assert measured("plain EViT", 768) > 3 * found


def test_a_gpu_measures_all_in_one_process(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    """As far as it goes without one: the calls run, and each has its memory."""
    given = options(monkeypatch, "--model", "tiny", "--img-size", "32", "--batch", "1", "--seconds", "0.01")
    setups = growth.groups(given)[0].setups[:2]
    calls, added = growth.in_this_process(setups)
    assert list(calls) == [str(setup) for setup in setups] and len(added) == 2
    assert all(call.seconds() > 0 for call in calls.values())


def test_a_gpu_begins_with_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growth.torch.cuda, "is_available", lambda: True)
    groups = growth.groups(options(monkeypatch, "--device", "cuda"))
    assert [group.setups[0].precision for group in groups] == ["bfloat16"] * 10 + ["float32"] * 10
    assert [group.setups[0].batch for group in groups[:10]] == [1] * 7 + [8, 64, 256]


def test_what_there_is_no_time_for_is_said(tmp_path: Path) -> None:
    stem = tmp_path / "growth-cpu"
    sizes = ("--model", "tiny", "--img-size", "32", "--precision", "float32", "--batch", "1")
    done = run(*sizes, "--minutes", "0.001", "--output", str(stem))
    assert done.returncode == 0, done.stderr
    results = json.loads(stem.with_suffix(".json").read_text())
    assert results["rows"] == [] and results["failures"] == []
    assert results["left_out"][0].startswith("5 tokens, batch 1, float32, 4 models (takes about 14 s")
    assert "no plot: nothing was measured" in done.stdout
    assert "Left out: 5 tokens" in done.stdout and "Left out: 5 tokens" in stem.with_suffix(".md").read_text()


def test_a_group_that_fails_costs_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure(group: list[growth.Setup], seconds: float) -> list[dict[str, Any]]:
        if group[0].side == 32:
            raise RuntimeError("out of memory\nand more")
        return [
            {**growth.asdict(s), "tokens": 17, "milliseconds": 1.0, "calls": 3, "peak_memory": 8}
            for s in group
        ]

    stem = tmp_path / "growth-cpu"
    given = ("--img-size", "32", "64", "--batch", "1", "--precision", "float32", "--output", str(stem))
    chosen = options(monkeypatch, *given)
    monkeypatch.setattr(growth, "parse", lambda: chosen)
    monkeypatch.setattr(growth, "measure", measure)
    assert growth.main() == 1
    results = json.loads(stem.with_suffix(".json").read_text())
    assert results["failures"] == ["5 tokens, batch 1, float32, 4 models: RuntimeError: out of memory"]
    assert len(results["rows"]) == 4 and "failed: 5 tokens" in capsys.readouterr().out
