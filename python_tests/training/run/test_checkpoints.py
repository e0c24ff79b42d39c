"""Checkpoints of a run: whole or not there, rotated, and a run that goes on as if it had not been killed."""

from __future__ import annotations

import errno
import logging
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import evit_ext
from evit_ext._util.randomness import random_state, set_random_state
from evit_ext.training import Precision, Recipe, RunCheckpoints, Trainer

pytestmark = pytest.mark.usefixtures("one_thread")

FLOAT32 = Precision(torch.float32, "test")
PLAIN = Recipe(epochs=4, batch_size=8, lr=3e-3, warmup_epochs=0.4)
STATE = {"model": {"weight": torch.arange(5.0)}, "step": 3, "name": "x", "numbers": [1, 2.5], "none": None}


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    checkpoints = RunCheckpoints(tmp_path / "runs" / "a")
    assert checkpoints.load_latest() is None
    path = checkpoints.save(STATE, 3)
    assert path.name == "checkpoint-000000003.pth"
    state, step = checkpoints.load_latest()  # type: ignore[misc]
    assert step == 3 and torch.equal(state.pop("model")["weight"], torch.arange(5.0))
    assert state == {name: value for name, value in STATE.items() if name != "model"}


def test_rotation(tmp_path: Path) -> None:
    checkpoints = RunCheckpoints(tmp_path, keep=2)
    (tmp_path / "notes.txt").write_text("not a checkpoint")
    for step in (1, 20, 3):
        checkpoints.save(STATE, step)
    assert checkpoints.steps() == [3, 20]
    assert (tmp_path / "notes.txt").exists()
    with pytest.raises(ValueError, match="keep must be at least 1, got 0"):
        RunCheckpoints(tmp_path, keep=0)
    with pytest.raises(FileNotFoundError):
        checkpoints.load(7)


def test_a_checkpoint_has_its_name_when_it_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = RunCheckpoints(tmp_path)
    seen: list[list[int]] = []
    sync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: seen.append(checkpoints.steps()) or sync(file))
    checkpoints.save(STATE, 1)
    assert seen == [[], [1]]  # the file's contents, then the folder's


def test_a_failed_write_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = RunCheckpoints(tmp_path)
    checkpoints.save(STATE, 1)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(
            OSError, match="the checkpoint of step 2 could not be written .*No space left"
        ) as error:
            checkpoints.save(STATE, 2)
    assert error.value.errno == errno.ENOSPC
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-000000001.pth"]
    assert checkpoints.load_latest() is not None


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk(tmp_path: Path) -> None:
    checkpoints = RunCheckpoints(tmp_path)
    leftover = tmp_path / ".checkpoint-000000001.pth.abc.unfinished"  # of a kill
    leftover.mkdir()
    (leftover / "checkpoint-000000001.pth").touch()
    original = Path.open

    def open_full(self: Path, *args: Any, **kwargs: Any) -> Any:
        return original(
            Path("/dev/full") if self.parent.name.endswith(".unfinished") else self, *args, **kwargs
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "open", open_full)
        with pytest.raises(OSError, match="could not be written"):
            checkpoints.save({"weight": torch.zeros(1_000_000)}, 2)
    assert not list(tmp_path.iterdir())


def test_damaged_checkpoints_are_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoints = RunCheckpoints(tmp_path, keep=9)
    for step in range(4):
        checkpoints.save({"weight": torch.full((1000,), float(step))}, step)
    truncated, flipped, empty = (checkpoints.path(step) for step in (1, 2, 3))
    truncated.write_bytes(truncated.read_bytes()[:-100])
    content = bytearray(flipped.read_bytes())
    place = content.find(np.full(4, 2.0, dtype="<f4").tobytes())
    content[place + 40] ^= 1
    flipped.write_bytes(content)
    empty.write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        state, step = checkpoints.load_latest()  # type: ignore[misc]
    assert step == 0 and state["weight"].sum() == 0
    assert len(caplog.records) == 3
    assert all("damaged" in record.getMessage() for record in caplog.records)


def test_nothing_in_a_checkpoint_is_executed(tmp_path: Path) -> None:
    class Harmful:
        def __reduce__(self) -> Any:
            return (os.system, (f"touch {tmp_path}/executed",))

    checkpoints = RunCheckpoints(tmp_path)
    torch.save({"model": Harmful()}, checkpoints.path(1))
    with pytest.raises(ValueError, match="more than tensors and plain values, and nothing in it is executed"):
        checkpoints.load(1)
    assert not (tmp_path / "executed").exists()


def test_random_generators(tmp_path: Path) -> None:
    def draw() -> list[float]:
        return [
            torch.rand(1).item(),
            np.random.randn(),
            np.random.rand(),
            random.random(),
            random.gauss(0, 1),
        ]

    draw()
    checkpoints = RunCheckpoints(tmp_path)
    checkpoints.save(random_state(), 1)
    expected = draw() + draw()
    set_random_state(checkpoints.load(1))
    assert draw() + draw() == expected


def test_random_generators_of_fewer_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run goes on where there are fewer; torch fails on generators of GPUs that are not there."""
    given: list[list[int]] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: [0, 1, 2, 3])
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", given.append)
    set_random_state(random_state())
    assert given == [[0, 1]]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "muon"])
@pytest.mark.parametrize("stop", [1, 5, 7])
def test_a_run_that_is_resumed_ends_as_one_that_was_not(
    small_vit: Any, tmp_path: Path, optimizer: str, stop: int
) -> None:
    recipe = Recipe(
        **{**vars(PLAIN), "optimizer": optimizer, "mixup": 0.2, "ema_decay": 0.9, "keep_rate": 0.5}
    )
    labels = torch.arange(40) % 5
    images = torch.randn(40, 3, 32, 32) + labels[:, None, None, None]
    batches = list(zip(images.split(8), labels.split(8), strict=True))

    def new() -> Trainer:
        torch.manual_seed(1)
        np.random.seed(1)
        model = evit_ext.apply(small_vit(drop_path_rate=0.3), 0.5)
        return Trainer(model, recipe, 5, precision=FLOAT32)

    def run(trainer: Trainer, until: int) -> list[Any]:
        class Stop(Exception):
            pass

        def after_step() -> None:
            if trainer.step == until:
                raise Stop

        results = []
        try:
            while trainer.step < until:
                left = batches[trainer.step_in_epoch :]
                result = trainer.train_one_epoch(left, progress=False, after_step=after_step)
                results.append(result[:3])  # but for the images per second
        except Stop:
            pass
        return results

    whole = new()
    expected = run(whole, 11)
    first = new()
    run(first, stop)
    checkpoints = RunCheckpoints(tmp_path)
    checkpoints.save(first.state_dict(), first.step)
    second = new()
    torch.rand(3)  # whatever happened in between
    second.load_state_dict(checkpoints.load(stop))
    assert second.step == stop
    results = run(second, 11)
    assert results == expected[-len(results) :]
    assert_equal(second.model, whole.model)
    assert_equal(second.ema.module, whole.ema.module)  # type: ignore[union-attr]


def assert_equal(model: nn.Module, other: nn.Module) -> None:
    for (name, value), expected in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(value, expected), name


def test_another_recipe_is_refused(small_vit: Any) -> None:
    trainer = Trainer(small_vit(), PLAIN, 5, precision=FLOAT32)
    state = trainer.state_dict()
    other = Trainer(small_vit(), Recipe(**{**vars(PLAIN), "lr": 0.5}), 6, precision=FLOAT32)
    with pytest.raises(
        ValueError, match="of another run: it has lr 0.003 instead of 0.5, steps_per_epoch 5 inst"
    ):
        other.load_state_dict(state)
