"""Images that cannot be read, and workers that fail or are left behind."""

from __future__ import annotations

import gc
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from open_loaders import fingerprints, loaders


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_counts_each_image_once(spoilt: Path, world_size: int) -> None:
    everything = fingerprints(loaders(spoilt).val())
    assert len(everything) == 6
    parts, unreadable = [], []
    for rank in range(world_size):
        batches = list(loaders(spoilt, rank, world_size, micro_batch=3, workers=rank % 2).val())
        parts += fingerprints(batches)
        unreadable += [report.path for batch in batches for report in batch.unreadable]
        assert all(batch.images.shape == (len(batch.labels), 3, 32, 32) for batch in batches)
    assert sorted(parts) == everything
    assert sorted(unreadable) == [str(spoilt / "val" / "flower" / f"{number}.jpg") for number in range(4)]


def test_a_batch_without_a_readable_image(spoilt: Path) -> None:
    shutil.rmtree(spoilt / "val" / "china")
    shutil.rmtree(spoilt / "train" / "china")
    batches = list(loaders(spoilt, micro_batch=4).val())
    assert [len(batch.labels) for batch in batches] == [0, 1]
    assert batches[0].images.shape == (0, 3, 32, 32) and len(batches[0].unreadable) == 4


def test_in_training_the_next_image_takes_the_place(spoilt: Path) -> None:
    """The last five files of flower: four bad ones, so 4.jpg is seen five times."""
    opened = loaders(spoilt, train_split="val", augment=False, micro_batch=5, workers=1)
    batches = list(opened.train(0))
    seen = fingerprints(batches)
    assert len(seen) == 10 and max(seen.count(one) for one in seen) == 5
    assert set(seen) == set(fingerprints(opened.val()))
    names = sorted({Path(report.path).name for batch in batches for report in batch.unreadable})
    assert names == ["0.jpg", "1.jpg", "2.jpg", "3.jpg"]
    assert (
        "100000x100000"
        in {Path(report.path).name: report.reason for batch in batches for report in batch.unreadable}[
            "3.jpg"
        ]
    )


def test_nothing_readable_ends_the_run(folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(folder, data)
    for path in (data / "train").rglob("*.jpg"):
        path.write_bytes(b"")
    for workers in (0, 1):
        with pytest.raises(RuntimeError, match=r"too many images in a row.*train/.*not an image"):
            list(loaders(data, workers=workers).train(0))


def test_a_file_that_vanishes_while_training(folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(folder, data)
    opened = loaders(data)
    (data / "train" / "china" / "3.jpg").unlink()
    reports = [report for batch in opened.train(0) for report in batch.unreadable]
    assert [Path(report.path).name for report in reports] == ["3.jpg"]
    assert "FileNotFoundError" in reports[0].reason


def test_workers_outlive_signals_but_not_their_process(folder: Path) -> None:
    """A run in a process group of its own is told to stop, goes on loading, and is then killed."""
    script = Path(__file__).parent / "loading_run.py"
    paths = [str(script.parents[1]), str(script.parents[2])]
    with subprocess.Popen(
        [sys.executable, str(script), str(folder)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        start_new_session=True,
    ) as run:
        assert run.stdout is not None
        try:
            worker = int(run.stdout.readline())
            os.killpg(run.pid, signal.SIGTERM)
            os.kill(worker, signal.SIGINT)
            # More than what the worker had prepared already.
            lines = [run.stdout.readline().split() for _ in range(8)]
            assert lines[-1] == ["batch", "7", "stopped"]
            assert Path(f"/proc/{worker}").exists()
        finally:
            run.kill()
    for _ in range(150):
        stat = Path(f"/proc/{worker}/stat")
        # Z: it has ended, and who has inherited it does not ask.
        if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.1)
    raise AssertionError("the worker is still there after 15 seconds")


def test_an_error_in_a_worker_leaves_no_worker(folder: Path, tmp_path: Path) -> None:
    """Also where a traceback keeps the loader until the garbage is collected."""
    opened = loaders(folder, workers=1, token_labels=str(tmp_path), patch_grid=(2, 2))
    with pytest.raises(FileNotFoundError, match="no token labels"):
        list(opened.train(0))
    gc.collect()
    for child in multiprocessing.active_children():
        child.terminate()
        child.join(timeout=3)
    assert not multiprocessing.active_children()
