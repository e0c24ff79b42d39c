"""How often torch compiles over a schedule of keep rates, and what it does beyond its limit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import evit_ext
from evit_ext.training import allow_recompiles

pytestmark = pytest.mark.usefixtures("one_thread")

BASE = 0.4
SCHEDULE: dict[str, Any] = {
    "steps_per_epoch": 10, "base_keep_rate": BASE, "start_epoch": 1, "end_epoch": 3,
    "num_patches": 16, "token_step": 3,
}  # fmt: skip


class Programs:
    """A backend that counts what it is given to compile, and how often that runs."""

    def __init__(self) -> None:
        self.compiled = 0
        self.ran = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        self.compiled += 1

        def program(*arguments: Tensor) -> Any:
            self.ran += 1
            return graph.forward(*arguments)

        return program


@pytest.fixture
def evit(small_vit: Any) -> Any:
    torch.compiler.reset()
    return evit_ext.apply(small_vit(depth=2), BASE, [0, 1]).train()


def images() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_a_program_for_every_keep_rate(evit: Any) -> None:
    """Forward and backward over a whole schedule, and the same gradients as without torch.compile."""
    levels = evit_ext.keep_rate_levels(BASE, 16, 3)
    assert len(levels) == 4
    programs, seen, parameters = Programs(), set(), list(evit.parameters())
    with allow_recompiles(len(levels)):
        compiled = torch.compile(evit, backend=programs, fullgraph=True, dynamic=False)
        for step in range(40):
            rate = evit_ext.keep_rate_schedule(step, **SCHEDULE)
            evit_ext.set_keep_rate(evit, rate)
            gradients = torch.autograd.grad(compiled(images()).square().sum(), parameters)
            if rate not in seen:
                expected = torch.autograd.grad(evit(images()).square().sum(), parameters)
                for gradient, without in zip(gradients, expected, strict=True):
                    torch.testing.assert_close(gradient, without)
            seen.add(rate)
    assert seen == set(levels)
    assert programs.compiled == len(levels) and programs.ran == 40


def count(evit: Any, levels: list[float]) -> Programs:
    """Train at each keep rate, twice, and count."""
    programs = Programs()
    compiled = torch.compile(evit, backend=programs, dynamic=False)
    for rate in [*levels, *levels]:
        evit_ext.set_keep_rate(evit, rate)
        compiled(images()).sum().backward()
    return programs


def test_the_limit(evit: Any) -> None:
    """Beyond it, torch runs what it has not compiled uncompiled, and says so in its log only."""
    levels = evit_ext.keep_rate_levels(BASE, 16, 3)
    with torch._dynamo.config.patch(recompile_limit=2):
        programs = count(evit, levels)
        assert programs.compiled == 2 and programs.ran == 2 * 2
        torch.compiler.reset()
        with allow_recompiles(len(levels)):
            programs = count(evit, levels)
    assert programs.compiled == len(levels) and programs.ran == 2 * len(levels)


def test_limits_are_raised_and_put_back() -> None:
    config = torch._dynamo.config
    before = config.recompile_limit, config.accumulated_recompile_limit
    with allow_recompiles(300):
        assert config.recompile_limit == before[0] + 300
        assert config.accumulated_recompile_limit == before[1] + 300
        assert config.cache_size_limit == config.recompile_limit  # its older name
    assert (config.recompile_limit, config.accumulated_recompile_limit) == before
    with pytest.raises(ValueError, match="count must not be negative, got -1"), allow_recompiles(-1):
        pass
