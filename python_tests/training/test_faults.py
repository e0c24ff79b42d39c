"""What happens to a run when things go wrong: it ends as it would have, or says what happened."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import image_data
import pytest
from training import runs


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Of a run on a folder of images; four steps an epoch, two epochs."""
    images = image_data.write_folder(tmp_path_factory.mktemp("images") / "data", train=24, val=5)
    return [*runs.SMALL, "--data", str(images)]


@pytest.fixture(scope="module")
def whole(options: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Runs that nothing happened to, by the number of processes."""
    folder = tmp_path_factory.mktemp("whole")
    for processes in (1, 2):
        runs.train(folder / str(processes), options, processes)
    return {processes: folder / str(processes) for processes in (1, 2)}


def kill_at_random(folder: Path, options: list[str], generator: random.Random, processes: int) -> bool:
    """Start the run, kill one of its processes; returns whether it was writing a checkpoint."""
    started = runs.start(folder, options, processes, folder.with_name("killed.log"))
    checkpoints = folder / "checkpoints"
    before = set(checkpoints.glob("*")) if checkpoints.exists() else set()
    limit = time.monotonic() + 60
    # From the first checkpoint on, so that every start gets somewhere.
    while set(checkpoints.glob("*.pth")) <= before and any(process.is_alive() for process in started):
        assert time.monotonic() < limit
        time.sleep(0.001)
    writing = generator.random() < 0.5
    moment = time.monotonic() + generator.random() * 0.2
    while any(process.is_alive() for process in started):
        if writing and any(checkpoints.glob("*.unfinished")):
            break
        if time.monotonic() > moment + writing:
            break
    victim = generator.choice(started)
    victim.kill()
    for process in started:  # as torchrun does
        if process is not victim:
            process.join(generator.random() * 0.1)
            process.terminate()
    for process in started:
        process.join(30)
        if process.is_alive():
            process.kill()
            process.join()
    return any(checkpoints.glob("*.unfinished"))


@pytest.mark.parametrize("processes", [1, 2])
def test_killed_at_random(options: list[str], whole: dict[int, Path], tmp_path: Path, processes: int) -> None:
    """SIGKILL, again and again, also while a checkpoint is written: as if nothing had happened."""
    generator = random.Random(processes)
    for _ in range(3):
        kill_at_random(tmp_path / "run", options, generator, processes)
    runs.train(tmp_path / "run", options, processes)
    runs.assert_same_run(tmp_path / "run", whole[processes])


@pytest.mark.faults
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_fifty_times(
    options: list[str], whole: dict[int, Path], tmp_path: Path, processes: int
) -> None:
    generator = random.Random(100 + processes)
    kills = writing = number = 0
    while kills < 50:
        folder = tmp_path / str(number)
        for _ in range(8):
            if not any(folder.glob("summary.json")):
                writing += kill_at_random(folder, options, generator, processes)
                kills += 1
        runs.train(folder, options, processes)
        runs.assert_same_run(folder, whole[processes])
        number += 1
    print(f"{kills} kills in {number} runs, {writing} of them while a checkpoint was written; none was lost")
    assert writing >= 5


@pytest.mark.parametrize("processes", [1, 2])
def test_asked_to_stop(options: list[str], whole: dict[int, Path], tmp_path: Path, processes: int) -> None:
    folder, log = tmp_path / "run", tmp_path / "log"
    started = runs.start(folder, [*options, "--checkpoint-every", "1000"], processes, log)
    while not any((folder / "metrics.csv").exists() and runs.metrics(folder) for _ in [0]):
        time.sleep(0.01)
    before = time.monotonic()
    started[-1].terminate()  # one of them is enough
    assert runs.wait(started) == [128 + signal.SIGTERM] * processes
    assert time.monotonic() - before < 10
    (checkpoint,) = (folder / "checkpoints").iterdir()
    assert "asked to stop" in log.read_text() and str(int(checkpoint.stem[-9:])) in log.read_text()
    runs.train(folder, [*options, "--checkpoint-every", "1000"], processes)
    runs.assert_same_run(folder, whole[processes])


def test_asked_to_stop_in_evaluation(tmp_path: Path) -> None:
    """The process that is not asked has ended its part, or would wait for the other in vain."""
    folder, log = tmp_path / "run", tmp_path / "log"
    # 3,600 images to evaluate on, which take seconds to draw.
    data = ["--dataset", "cluttered-digits", "--train-images", "12", "--epochs", "2"]
    started = runs.start(
        folder, [*runs.SMALL, *data, "--micro-batch", "6", "--auto-augment", "none", "--reprob", "0"], 2, log
    )
    while not (folder / "checkpoints" / "checkpoint-000000001.pth").exists():
        assert all(process.is_alive() for process in started), log.read_text()
        time.sleep(0.01)
    started[1].terminate()
    assert runs.wait(started) == [128 + signal.SIGTERM] * 2
    assert "asked to stop: the checkpoint of step 1 is written" in log.read_text()
    assert "error" not in log.read_text()
    assert "val" not in {row["kind"] for row in runs.metrics(folder)}


def test_no_checkpoint_is_whole(options: list[str], tmp_path: Path) -> None:
    """To begin anew would overwrite what is left of the run."""
    folder, log = tmp_path / "run", tmp_path / "log"
    runs.train(folder, [*options, "--epochs", "1", "--keep-rate-end-epoch", "1"])
    for path in (folder / "checkpoints").iterdir():
        path.write_bytes(path.read_bytes()[:-1000])
    assert runs.wait(
        runs.start(folder, [*options, "--epochs", "1", "--keep-rate-end-epoch", "1"], 1, log)
    ) == [2]
    assert f"every checkpoint in {folder / 'checkpoints'} is damaged" in log.read_text()


def test_two_runs_in_a_folder(options: list[str], tmp_path: Path) -> None:
    folder, logs = tmp_path / "run", [tmp_path / "first", tmp_path / "second"]
    first = runs.start(folder, [*options, "--epochs", "50"], 1, logs[0])
    while not (folder / "metrics.csv").exists():
        time.sleep(0.01)
    assert runs.wait(runs.start(folder, [*options, "--epochs", "50"], 2, logs[1])) == [2, 2]
    assert f"another run is using {folder}" in logs[1].read_text()
    first[0].kill()
    first[0].join()
    second = runs.start(folder, [*options, "--epochs", "50"], 1, logs[1])  # the lock went with the process
    while "epoch" not in logs[1].read_text() and "goes on" not in logs[1].read_text():
        assert second[0].is_alive()
        time.sleep(0.01)
    second[0].kill()
    second[0].join()


def test_truncated_checkpoint(options: list[str], whole: dict[int, Path], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    while len(list(folder.glob("checkpoints/*.pth"))) < 2:
        kill_at_random(folder, options, random.Random(7), 1)
    newest = max((folder / "checkpoints").glob("*.pth"))
    newest.write_bytes(newest.read_bytes()[:-1000])
    text = runs.train(folder, options)
    assert f"{newest} is not complete, or damaged" in text
    runs.assert_same_run(folder, whole[1])


def test_a_process_that_dies(options: list[str], tmp_path: Path) -> None:
    log = tmp_path / "log"
    started = runs.start(tmp_path / "run", [*options, "--epochs", "50"], 2, log)
    while not (tmp_path / "run" / "metrics.csv").exists():
        time.sleep(0.01)
    os.kill(started[1].pid, signal.SIGKILL)
    assert runs.wait(started) == [1, -signal.SIGKILL]
    assert "another process" in log.read_text()
    assert "Traceback" not in log.read_text()


def test_full_disk(options: list[str], whole: dict[int, Path], tmp_path: Path) -> None:
    folder, log = tmp_path / "run", tmp_path / "log"
    kill_at_random(folder, options, random.Random(3), 1)
    before = {path.name: path.read_bytes() for path in (folder / "checkpoints").glob("*.pth")}
    # The system refuses to write more than this to one file, as it does where the disk is full.
    started = runs.start(folder, options, 1, log, largest_file=100_000)
    assert runs.wait(started) == [1]
    assert "could not be written" in log.read_text() and "is intact" in log.read_text()
    assert "Traceback" not in log.read_text()
    assert {path.name: path.read_bytes() for path in (folder / "checkpoints").iterdir()} == before
    runs.train(folder, options)
    runs.assert_same_run(folder, whole[1])


def test_loss_that_is_not_finite(options: list[str], tmp_path: Path) -> None:
    log = tmp_path / "log"
    started = runs.start(tmp_path / "run", [*options, "--lr", "1e30", "--clip-grad", "none"], 2, log)
    assert runs.wait(started) == [1, 1]
    text = log.read_text()
    assert "is not finite at step" in text and text.count("is not finite") == 1
