"""Threads that run, reconfigure and record one model at the same time."""

from __future__ import annotations

import itertools
import random
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

import evit_ext

pytestmark = pytest.mark.usefixtures("one_thread")

RATES = (0.8, 0.5)
STAGES = (1, 2)
ROUNDS = 60


@pytest.fixture
def often() -> Iterator[None]:
    """Have Python's threads take turns a thousand times as often as usual."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(5e-6)
    yield
    sys.setswitchinterval(before)


def images() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def by_rates(model: Any) -> list[Tensor]:
    """The logits for every choice of keep rates of the stages."""
    found = []
    for rates in itertools.product(RATES, repeat=len(STAGES)):
        evit_ext.set_keep_rate(model, rates)
        found.append(model(images()))
    return found


def together(*jobs: Callable[[], None]) -> None:
    """Run each job in a thread of its own; raise what the first of them raises."""
    ready = threading.Barrier(len(jobs))

    def begin(job: Callable[[], None]) -> None:
        ready.wait()
        job()

    with ThreadPoolExecutor(len(jobs)) as pool:
        for done in [pool.submit(begin, job) for job in jobs]:
            done.result()


def test_run_reconfigure_and_record(small_vit: Any, often: None) -> None:
    """A stage keeps at its old rate or at its new one; nothing else comes out, and nobody fails."""
    model = evit_ext.apply(small_vit(depth=4), RATES, STAGES)
    expected = by_rates(model)

    def known(logits: Tensor) -> bool:
        return any(torch.allclose(logits, one, rtol=1e-4, atol=1e-5) for one in expected)

    @torch.no_grad()
    def run() -> None:
        for _ in range(ROUNDS):
            assert known(model(images()))

    def reconfigure() -> None:
        generator = random.Random(0)
        for _ in range(20 * ROUNDS):
            evit_ext.set_keep_rate(model, generator.choices(RATES, k=len(STAGES)))

    @torch.no_grad()
    def record() -> None:
        for _ in range(ROUNDS):
            with evit_ext.record_tokens(model) as found:
                assert known(model(images()))
            assert len(found.scores) in (1, 2)

    together(run, run, reconfigure, record)


def test_records_of_several_threads(small_vit: Any, often: None) -> None:
    """Each has the stages of whole forwards, as all threads show the same images to the same model."""
    model = evit_ext.apply(small_vit(depth=4), RATES, STAGES)
    with torch.no_grad(), evit_ext.record_tokens(model) as record:
        logits = model(images())
    kept = record.kept

    @torch.no_grad()
    def run() -> None:
        for _ in range(ROUNDS):
            with evit_ext.record_tokens(model) as found:
                assert torch.allclose(model(images()), logits, rtol=1e-4, atol=1e-5)
            assert all(torch.equal(ours, one) for ours, one in zip(found.kept, kept, strict=False))

    together(run, run, run)
