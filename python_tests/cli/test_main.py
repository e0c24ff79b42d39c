"""The command evit: what it prints, and what it says of bad input."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from evit_ext.cli import main
from evit_ext.training.ranks import ALONE, Ranks
from evit_ext.training.run.stopping import Stopped


def test_without_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([])
    assert exit_.value.code == 2
    assert "COMMAND" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "given", "spins"),
    [
        ("info deit_tiny", {}, False),
        ("info deit_tiny", {"OMP_WAIT_POLICY": "ACTIVE"}, True),
        ("benchmark nosuchmodel", {}, True),
    ],
)
def test_threads_sleep_while_they_wait(command: str, given: dict[str, str], spins: bool) -> None:
    """By what OpenMP says of itself when torch is loaded."""
    inherited = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    run = subprocess.run(
        [sys.executable, "-m", "evit_ext", *command.split()],
        env={**inherited, **given, "OMP_DISPLAY_ENV": "VERBOSE"},
        capture_output=True,
        text=True,
    )
    found = re.search(r"GOMP_SPINCOUNT = '(\d+)'", run.stderr)
    if found is None:
        pytest.skip("torch's OpenMP is not GNU's, and does not say how often it looks before it sleeps")
    assert (int(found[1]) > 0) == spins


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
        def __init__(self, *arguments: object, **more: object) -> None:
            pass

        def train(self) -> None:
            raise error

        def advice(self) -> str:
            return "advice"

    monkeypatch.setattr("evit_ext.training.ranks.join", join)
    monkeypatch.setattr("evit_ext.training.run.run.Run", Failing)
    assert main(["train", "--output", str(tmp_path)]) == (1 if left_with else 143)
    assert seen == [left_with]
