"""The command evit: what it prints, and what it says of bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import evit_ext
from evit_ext import _C
from evit_ext.cli import main, train
from evit_ext.training.ranks import ALONE, Ranks
from evit_ext.training.stopping import Stopped


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(arguments) == 0
    return capsys.readouterr().out


def test_both_methods_side_by_side(capsys: pytest.CaptureFixture[str]) -> None:
    out = run(capsys, "info")
    lines = [line.split() for line in out.splitlines()]
    assert ["model", "parameters", "1", "0.9", "0.8", "0.7", "0.6", "0.5"] in lines
    assert ["deit_small", "22.05", "M", "4.60", "4.02", "3.48", "3.03", "2.64", "2.31"] in lines
    assert ["dynamicvit_small", "22.77", "M", "4.74", "4.04", "3.46", "2.98", "2.56", "2.23"] in lines
    assert f"evit_ext: {evit_ext.__version__}" in out
    assert f"cpu_capability: {_C.build_info()['cpu_capability']}" in out


def test_other_models_and_sizes_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    names = ("lvvit_small", "vit_small_patch16_224", "evit_deit_tiny_patch16_224")
    out = json.loads(run(capsys, "info", *names, "--keep-rate", "0.7", "--json"))
    assert [cost["model"] for cost in out["models"]] == list(names)
    gmacs = {cost["model"]: f"{cost['gmacs']['0.7']:.2f}" for cost in out["models"]}
    assert gmacs == {
        "lvvit_small": "4.71",
        "vit_small_patch16_224": "3.03",
        "evit_deit_tiny_patch16_224": "0.82",
    }
    assert out["build"]["cuda_operators"] is _C.build_info()["cuda_operators"]
    larger = json.loads(
        run(capsys, "info", "deit_small", "--keep-rate", "0.5", "--img-size", "304", "--json")
    )
    assert f"{larger['models'][0]['gmacs']['0.5']:.2f}" == "4.44"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "there is no model 'nothing': expected one of deit_base,"),
        (["resnet18"], "ResNet is not supported"),
        (["beit_base_patch16_224", "--img-size", "8"], "Calculated padded input size"),
        (["deit_tiny", "--keep-rate", "1.5"], r"keep_rate must be in (0, 1], got 1.5"),
    ],
)
def test_bad_input(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert main(["info", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("evit: error: ") and message in captured.err
    assert captured.err.count("\n") == 1 and not captured.out


def test_without_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([])
    assert exit_.value.code == 2
    assert "COMMAND" in capsys.readouterr().err


def test_the_command_is_installed(tmp_path: Path) -> None:
    code = "from importlib.metadata import entry_points as e; print(e(group='console_scripts')['evit'].value)"
    # Elsewhere, because what an earlier build left in the source tree would be found first.
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert out.stdout.strip() == "evit_ext.cli:main"


@pytest.mark.parametrize(
    ("error", "left_with"),
    [(OSError("no space"), True), (FloatingPointError("NaN"), True), (Stopped("asked", 15), False)],
)
def test_a_run_that_fails_waits_for_no_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, left_with: bool
) -> None:
    """`join` only leaves NCCL's group alone, whose work others may never do, if it sees an error."""
    seen: list[bool] = []

    @contextmanager
    def join(device: str) -> Iterator[Ranks]:
        try:
            yield ALONE
        except BaseException:
            seen.append(True)
            raise
        seen.append(False)

    class Failing:
        def __init__(self, *arguments: object) -> None:
            pass

        def train(self) -> None:
            raise error

        def advice(self) -> str:
            return "advice"

    monkeypatch.setattr(train, "join", join)
    monkeypatch.setattr("evit_ext.training.run.Run", Failing)
    assert main(["train", "--output", str(tmp_path)]) == (1 if left_with else 143)
    assert seen == [left_with]
