"""Calls in processes of their own."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from evit_ext.benchmark import Apart, Contestant, apart, contestants, measure, time_in_turns

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 2, "num_classes": 10}


def notes(file: Path) -> Callable[[], None]:
    """Return what writes down its process and its threads."""

    def note() -> None:
        time.sleep(0.01)
        with file.open("a") as lines:
            lines.write(f"{os.getpid()} {torch.get_num_threads()}\n")

    return note


def takes_memory(mib: int) -> Callable[[], object]:
    return lambda: torch.ones(mib * 2**20, dtype=torch.uint8)


def fails(when: str) -> Callable[[], object]:
    if when == "made":
        raise ValueError("no such thing")
    if when == "killed":
        return lambda: os.kill(os.getpid(), signal.SIGKILL)
    raise_error: Callable[[], object] = lambda: [][0]  # noqa: E731
    return raise_error


def test_each_call_has_a_process_and_the_threads_of_this_one(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with apart({name: (notes, (tmp_path / name,)) for name in "ab"}) as calls:
            times = time_in_turns(calls, seconds=0.0, least=2)
            processes = [call._process for call in calls.values()]
            assert all(process.is_alive() for process in processes)
    finally:
        torch.set_num_threads(threads)
    assert not any(process.is_alive() for process in processes)
    assert all(0.01 <= taken < 1 for taken in times["a"] + times["b"])
    found = [set((tmp_path / name).read_text().splitlines()) for name in "ab"]
    assert found == [{f"{process.pid} 3"} for process in processes] and found[0] != found[1]
    assert (tmp_path / "a").read_text().count("\n") == 4  # two of them untimed


def test_memory_is_that_of_the_process() -> None:
    kept = torch.ones(64 * 2**20, dtype=torch.uint8)
    with apart({"call": (takes_memory, (32,))}) as calls:
        added = calls["call"].memory()
    assert kept.sum() == 64 * 2**20
    if added is None:
        pytest.skip("only Linux counts a peak anew")
    assert 31 * 2**20 <= added <= 36 * 2**20


def test_what_fails_there_is_said_here() -> None:
    with pytest.raises(RuntimeError, match="in a process that was measured: ValueError: no such thing"):
        Apart(fails, "made")
    with apart({"call": (fails, ("called",))}) as calls:
        for _ in range(2):  # and the process stays
            with pytest.raises(RuntimeError, match="IndexError: list index out of range"):
                calls["call"].seconds()
    with (
        apart({"call": (fails, ("killed",))}) as calls,
        pytest.raises(RuntimeError, match="has ended, with exit status -9"),
    ):
        calls["call"].seconds()


def test_what_cannot_be_pickled() -> None:
    model = nn.Linear(2, 2)
    model.register_forward_hook(lambda *_: None)
    with pytest.raises(TypeError, match="must be picklable: .*lambda.*apart=False"):
        measure([Contestant("hooked", model, 1.0, None)], torch.randn(2, 2))


def test_training_there_leaves_the_weights_here_alone() -> None:
    models = contestants("vit_tiny_patch16_224", (0.7,), **TINY)
    before = [{key: value.clone() for key, value in m.model.state_dict().items()} for m in models]
    rows = measure(models, torch.randn(2, 3, 32, 32), "training", seconds=0.0)
    assert [row.model for row in rows] == ["dense", "EViT 0.7"]
    for model, state in zip(models, before, strict=True):
        assert all(torch.equal(value, state[key]) for key, value in model.model.state_dict().items())
