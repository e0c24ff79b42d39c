"""Commands whose output nobody reads to the end: a training goes on, the others end quietly."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import IO

import pytest

from evit_ext.cli.output import going_on_unread

TRAIN = (
    "train --dataset digits --model vit_tiny_patch16_224 --model-args patch_size=16 embed_dim=24 depth=2 "
    "num_heads=2 --drop-loc 1 --img-size 32 --epochs 2 --warmup-epochs 0 --batch-size 400 --workers 0 "
    "--log-every 1 --no-tensorboard --device cpu --precision float32 --output"
)


def run(
    line: str, stdout: int | IO[str], stderr: int | IO[str] = subprocess.PIPE
) -> subprocess.CompletedProcess[str]:
    code = f"import sys; from evit_ext.cli import main; sys.exit(main({line.split()!r}))"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", code], stdout=stdout, stderr=stderr, text=True, env=environment
    )


def closed_pipe() -> int:
    """Return the end of a pipe whose reader has gone."""
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def assert_trained(folder: Path) -> None:
    assert json.loads((folder / "summary.json").read_text())["epochs"] == 2
    assert len(list((folder / "checkpoints").iterdir())) == 2


def test_a_training_goes_on(tmp_path: Path) -> None:
    """As `evit train | head -1`: the run is neither ended nor called failed."""
    folder = tmp_path / "run"
    with os.fdopen(closed_pipe()) as pipe:
        done = run(f"{TRAIN} {folder}", pipe)
    said = f"evit train: the run goes on in {folder}: its output cannot be written any more (Broken pipe)\n"
    assert (done.returncode, done.stderr) == (0, said)
    assert_trained(folder)


def test_a_training_goes_on_without_any_output(tmp_path: Path) -> None:
    """As `evit train 2>&1 | head -1`."""
    with os.fdopen(closed_pipe()) as pipe:
        assert run(f"{TRAIN} {tmp_path / 'run'}", pipe, pipe).returncode == 0
    assert_trained(tmp_path / "run")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a device that is always full")
def test_a_log_on_a_full_disk() -> None:
    code = """
import sys
from evit_ext.cli.output import going_on_unread
with going_on_unread("work goes on"):
    for number in range(3):
        print(number, flush=True)
sys.exit(7)
"""
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 7
    assert done.stderr == "work goes on: its output cannot be written any more (No space left on device)\n"


def test_what_can_be_written_is(capsys: pytest.CaptureFixture[str]) -> None:
    with going_on_unread("nothing"):
        print("out")
        print("error", file=sys.stderr)
    assert capsys.readouterr() == ("out\n", "error\n")


@pytest.mark.parametrize("line", ["info deit_tiny", "--completion bash"])
def test_a_reader_that_has_enough(line: str) -> None:
    """As `evit info | head -1`: neither an error nor a traceback, and the status of other commands."""
    with os.fdopen(closed_pipe()) as pipe:
        done = run(line, pipe)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


def test_no_output_at_all() -> None:
    """As `evit info >&-`, which leaves Python without sys.stdout."""
    code = "import sys; from evit_ext.cli import main; sys.exit(main(['info', 'deit_tiny']))"
    command = ["/bin/sh", "-c", '"$0" -c "$1" >&-', sys.executable, code]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (0, "")
