"""The keep rate during training."""

from __future__ import annotations

import math


def keep_rate_schedule(
    step: int,
    *,
    steps_per_epoch: int,
    base_keep_rate: float,
    start_epoch: float = 10,
    end_epoch: float = 110,
) -> float:
    """Return the keep rate for a training step: 1 at first, a half cosine down, then the base keep rate.

    The schedule with which EViT was trained for 300 epochs (Liang et al., ICLR 2022, section 4).

    Under ``torch.compile`` every new keep rate compiles the model again, and torch stops compiling after a
    few (``torch._dynamo.config.recompile_limit``): round the keep rate to few values there.

    Args:
        step: number of optimizer steps done since the start of training, from 0.
        steps_per_epoch: optimizer steps in an epoch.
        base_keep_rate: the keep rate to arrive at, in (0, 1].
        start_epoch: the keep rate is 1 up to this epoch.
        end_epoch: the keep rate is `base_keep_rate` from this epoch on; with `start_epoch` equal to it the
            keep rate falls at once.

    Returns:
        The keep rate, in [base_keep_rate, 1]: for :func:`evit_ext.set_keep_rate`.

    Raises:
        ValueError: an argument is out of range.
    """
    if step < 0:
        raise ValueError(f"step must not be negative, got {step}")
    if steps_per_epoch < 1:
        raise ValueError(f"steps_per_epoch must be at least 1, got {steps_per_epoch}")
    if not 0 < base_keep_rate <= 1:
        raise ValueError(f"base_keep_rate must be in (0, 1], got {base_keep_rate}")
    if not 0 <= start_epoch <= end_epoch:
        raise ValueError(f"expected 0 <= start_epoch <= end_epoch, got {start_epoch} and {end_epoch}")
    start, end = start_epoch * steps_per_epoch, end_epoch * steps_per_epoch
    if step >= end:
        return float(base_keep_rate)
    if step < start:
        return 1.0
    progress = (step - start) / (end - start)
    return base_keep_rate + (1 - base_keep_rate) * (math.cos(math.pi * progress) + 1) / 2
