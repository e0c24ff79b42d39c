"""Being asked to stop, in every state of a run: it ends within seconds, with a checkpoint."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import runs
from image_data import write_folder

from evit_ext.training import waiting
from evit_ext.training.run.checkpoints import RunCheckpoints

LONG = [*runs.SMALL, "--epochs", "500", "--checkpoint-every", "100000", "--eval-every", "1000"]

WAITING = """
import os, signal, sys, threading, time
from evit_ext.training import waiting
from evit_ext.training.run.stopping import StoppedWaiting, StopSignals
waiting.TOLD_AFTER, waiting.SECOND, waiting.GRACE_OF_RANKS = 0.3, 0.5, 1.0
watch = waiting.Watch()
with StopSignals(watch, lambda: "advice"):
    print("ready", flush=True)
    {}
"""


def until(condition: object, seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.1)


@pytest.mark.parametrize("workers", [0, 2])
def test_images_that_never_come(tmp_path: Path, workers: int) -> None:
    """As of a dead mount: opening a pipe that nobody writes to waits for ever."""
    data = write_folder(tmp_path / "data", train=7, val=2)
    folder, log = tmp_path / "run", tmp_path / "run.log"
    options = [*LONG, "--data", str(data), "--workers", str(workers), "--output", str(folder)]
    # In a process as of a terminal: how the harness of `runs` ends its processes is its own.
    with log.open("w") as output:
        command = [sys.executable, "-m", "evit_ext", "train", *options, "--device", "cpu"]
        process = subprocess.Popen(command, stdout=output, stderr=output)
    metrics = folder / "metrics.csv"
    until(lambda: metrics.exists() and metrics.read_text().count("\n") > 5)
    for path in (data / "train").rglob("*.jpg"):
        path.unlink()
        os.mkfifo(path)

    def stands_still() -> bool:
        before = metrics.read_text()
        time.sleep(2)
        return metrics.read_text() == before

    until(stands_still)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM, log.read_text()
    assert time.monotonic() - began < 25  # less than schedulers grant
    said = log.read_text()
    assert f"asked to stop while waiting for images of {data} from the loader ({workers} workers)" in said
    step = int(metrics.read_text().strip().splitlines()[-1].split(",")[0])
    assert max(RunCheckpoints(folder / "checkpoints").steps()) == step
    assert "the newest checkpoint is" in said and "Traceback" not in said


def test_a_second_sigterm_ends_it_at_once(tmp_path: Path) -> None:
    """The main thread is in a call that no signal interrupts."""
    program = WAITING.format("threading.Event().wait(60)")
    process = subprocess.Popen([sys.executable, "-c", program], stdout=-1, stderr=-1, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    for _ in range(3):  # twice at once, as launchers pass a signal on, is one
        process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    assert process.poll() is None
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 128 + signal.SIGTERM
    assert "a second signal came: ended; advice" in process.communicate()[1]


def test_waiting_for_other_processes_ends_after_its_grace(tmp_path: Path) -> None:
    program = WAITING.format("with watch.waiting('the other processes'): threading.Event().wait(60)")
    process = subprocess.Popen([sys.executable, "-c", program], stdout=-1, stderr=-1, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    time.sleep(0.6)
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 128 + signal.SIGTERM
    said = process.communicate()[1]
    assert "waiting for the other processes, for 0 s now\n" in said  # before the signal, too
    assert "still waiting for the other processes, 1 s after being asked to stop: ended; advice" in said


HANGING = """
import os, sys, threading
from evit_ext.cli import main
from evit_ext.training import waiting
from evit_ext.training.trainer import Trainer
waiting.GRACE_OF_RANKS = 3.0
optimize = Trainer._optimize

def hang(trainer, batches):
    if os.environ["RANK"] == "1" and trainer.step == 5:
        print("hangs", flush=True)
        threading.Event().wait()
    return optimize(trainer, batches)

Trainer._optimize = hang
sys.exit(main(sys.argv[1:]))
"""


def test_a_collective_that_never_ends(tmp_path: Path) -> None:
    """A process hangs, the other waits for its gradients: each ends after one SIGTERM."""
    data, folder = write_folder(tmp_path / "data", train=24, val=2), tmp_path / "run"
    options = [*LONG, "--data", str(data), "--workers", "0", "--output", str(folder), "--device", "cpu"]
    command = [sys.executable, "-c", HANGING, "train", *options, "--checkpoint-every", "2"]
    started = runs.processes_of(command, 2, tmp_path)
    until(lambda: "hangs" in (tmp_path / "1.log").read_text())
    time.sleep(1)  # the other is in its backward by then
    began = time.monotonic()
    for process in started:
        process.send_signal(signal.SIGTERM)
    logs = [(tmp_path / f"{rank}.log").read_text for rank in range(2)]
    assert [process.wait(60) for process in started] == [128 + signal.SIGTERM] * 2, [log() for log in logs]
    assert time.monotonic() - began < 20  # of 30 s that schedulers grant, on a busy machine
    found = RunCheckpoints(folder / "checkpoints").load_latest()
    assert found is not None and found[1] == 4
    for log in logs:
        assert "evit train: step 6 does not end" in log() and "checkpoint-000000004.pth" in log()


def test_a_step_may_take_as_long_as_those_before(tmp_path: Path) -> None:
    """Steps of 0.8 s, with a grace of 0.5 s: the step ends. One of 3 s is given up."""
    steps = """
    waiting.GRACE_OF_RANKS = 0.5
    for seconds in (0.8, 0.8, 1.5, {}):
        watch.begin("step")
        if seconds == 1.5: os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(seconds)
    watch.begin("")
    time.sleep(4)  # as for writing a file
    """
    done = {}
    for last in (0.1, 9):
        program = WAITING.format(steps.strip().format(last))
        done[last] = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, timeout=60
        )
    assert done[0.1].returncode == 0 and not done[0.1].stderr
    assert done[9].returncode == 143 and "step does not end" in done[9].stderr


def test_what_is_not_waiting_is_only_noted() -> None:
    program = WAITING.format(
        "os.kill(os.getpid(), signal.SIGTERM); time.sleep(2)\n    print('went on', flush=True)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout == "ready\nwent on\n" and not done.stderr


def test_what_is_waited_for_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(waiting, "TOLD_AFTER", 0.1)
    with waiting.told("the hub"):
        pass
    time.sleep(0.3)
    assert not capsys.readouterr().err
    with waiting.told("the hub"):
        time.sleep(0.3)
    assert capsys.readouterr().err == "waiting for the hub, for 0 s now\n"
