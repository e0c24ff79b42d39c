"""Progress: lines in a log, a bar on a terminal, nothing where it is not wanted."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import sys
import termios

import pytest

from evit_ext.training import Progress
from evit_ext.training import progress as module


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds, which pass only where a test lets them."""
    now = [100.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    return now


def run(enabled: bool = True) -> None:
    with Progress("train", 3, enabled) as bar:
        for step in range(3):
            bar.step(loss=f"{step}.5")


def test_a_log_gets_the_last_line(capsys: pytest.CaptureFixture[str]) -> None:
    run()
    assert capsys.readouterr().out == "train: 3/3  in 0:00:00  loss 2.5\n"


def test_a_log_gets_a_line_now_and_then_with_the_time_left(
    capsys: pytest.CaptureFixture[str], clock: list[float]
) -> None:
    with Progress("train", 405, start=400) as bar:
        for step in range(5):
            clock[0] += 10.0 + 10.0 * (step == 4)
            bar.step(**({"loss": "1.5"} if step == 0 else {}))
    assert capsys.readouterr().out.splitlines() == [
        # Two steps since the start took 20 seconds; figures stay until there are newer ones.
        "train: 402/405  0:00:30 left  loss 1.5",
        "train: 404/405  0:00:10 left  loss 1.5",
        "train: 405/405  in 0:01:00  loss 1.5",
    ]


def test_where_the_end_is_not_known(capsys: pytest.CaptureFixture[str], clock: list[float]) -> None:
    with Progress("read", None) as bar:
        clock[0] += 20.0
        bar.step()
    assert capsys.readouterr().out == "read: 1\nread: 1  in 0:00:20\n"


def test_nothing_where_not_wanted(capsys: pytest.CaptureFixture[str]) -> None:
    run(enabled=False)
    with Progress("nothing done", 3):
        pass
    assert capsys.readouterr() == ("", "")


def test_a_terminal_gets_a_bar(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    with Progress("train", 10, start=7) as bar:
        for step in range(3):
            bar.step(**({"loss": "2.5"} if step == 0 else {}))
    out = capsys.readouterr().out
    assert "\r" in out
    assert "7/10" in out and "10/10" in out
    assert "loss=2.5" in out.rsplit("\r", 1)[1]


@pytest.mark.parametrize("columns", [0, 60])
def test_the_width_of_a_terminal(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", columns // 2, columns, 0, 0))
    with open(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        run()
        read = b""
        while b"loss=2.5]" not in read:  # it comes in pieces
            read += os.read(ours, 10_000)
    os.close(ours)
    out = read.decode()
    assert "3/3" in out and "loss=2.5" in out
    # 0 is a terminal that does not know. How much of its width tqdm takes depends on the figures.
    width = max(map(len, out.replace("\r", "\n").split("\n")))
    assert 0.9 * (columns or 100) <= width <= (columns or 100)


def test_a_terminal_without_tqdm_gets_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setitem(sys.modules, "tqdm", None)
    run()
    assert capsys.readouterr().out == "train: 3/3  in 0:00:00  loss 2.5\n"


def test_a_start_that_cannot_be() -> None:
    with pytest.raises(ValueError, match=r"start must be in \[0, 3\], the steps in all, got 4"):
        Progress("train", 3, start=4)
