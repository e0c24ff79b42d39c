"""torch.compile in a training whose keep rate falls: as many compilations as there are keep rates."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch._dynamo

from evit_ext.tokens.schedule import keep_rate_levels
from evit_ext.training.config import TrainConfig


@contextmanager
def allow_recompiles(count: int) -> Iterator[None]:
    """Let ``torch.compile`` compile a function `count` times more than it would, while the context is open.

    A reorganising block keeps a number of patches that is part of the compiled program, so every keep rate is
    compiled by itself. torch stops after ``torch._dynamo.config.recompile_limit`` (8) programs of a function,
    or ``accumulated_recompile_limit`` (256): it logs a warning, and what would be the next program runs
    uncompiled from then on, the earlier ones being used where they fit. With ``fullgraph=True`` it raises
    ``torch._dynamo.exc.FailOnRecompileLimitHit`` instead.

    Training along :func:`evit_ext.keep_rate_schedule` with a token_step has
    ``len(evit_ext.keep_rate_levels(...))`` programs. Evaluation in between, being in eval mode and without
    gradients, has as many again, and so has each further model of the same class, such as a moving average,
    if it is compiled, too. Compile with ``dynamic=False``: otherwise torch first tries to have one program
    for several keep rates, in vain, and compiles once more for that.

    Args:
        count: programs, over all that is compiled of one function.

    Raises:
        ValueError: `count` is negative.
    """
    if count < 0:
        raise ValueError(f"count must not be negative, got {count}")
    config = torch._dynamo.config
    with config.patch(
        recompile_limit=config.recompile_limit + count,
        accumulated_recompile_limit=config.accumulated_recompile_limit + count,
    ):
        yield


def programs_of_run(config: TrainConfig, num_patches: int, say: Callable[[str], None]) -> int:
    """Return how many programs torch.compile makes of a block at most in a run, and say so; 0 without it.

    Args:
        config: of the run.
        num_patches: of the model.
        say: prints a line.
    """
    if not config.compile:
        return 0
    levels = [1.0]
    if config.keep_rate is not None and config.keep_rate_token_step is not None:
        levels = keep_rate_levels(config.keep_rate, num_patches, config.keep_rate_token_step)
    rates = "1 keep rate" if len(levels) == 1 else f"{len(levels)} keep rates"
    say(f"torch.compile compiles for at most {rates}, for training and for evaluation")
    # Besides training and evaluation, a last batch that is smaller.
    return 3 * len(levels)
