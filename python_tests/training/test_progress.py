"""Progress: lines in a log, a bar on a terminal, nothing where it is not wanted."""

from __future__ import annotations

import sys

import pytest

from evit_ext.training import Progress
from evit_ext.training import progress as module


def run(enabled: bool = True) -> None:
    with Progress("train", 3, enabled) as bar:
        for step in range(3):
            bar.step(loss=f"{step}.5")


def test_a_log_gets_the_last_line(capsys: pytest.CaptureFixture[str]) -> None:
    run()
    assert capsys.readouterr().out == "train: 3/3  loss 2.5\n"


def test_a_log_gets_lines_in_between(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_SECONDS_BETWEEN_LINES", 0.0)
    run()
    assert capsys.readouterr().out.splitlines()[:2] == ["train: 1/3  loss 0.5", "train: 2/3  loss 1.5"]


def test_nothing_where_not_wanted(capsys: pytest.CaptureFixture[str]) -> None:
    run(enabled=False)
    with Progress("nothing done", 3):
        pass
    assert capsys.readouterr() == ("", "")


def test_a_terminal_gets_a_bar(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    run()
    out = capsys.readouterr().out
    assert "\r" in out
    assert "3/3" in out
    assert "loss=2.5" in out


def test_a_terminal_without_tqdm_gets_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setitem(sys.modules, "tqdm", None)
    run()
    assert capsys.readouterr().out == "train: 3/3  loss 2.5\n"
