"""The keep rate during training: as published, and in whole tokens."""

from __future__ import annotations

import math


def keep_rate_schedule(
    step: int,
    *,
    steps_per_epoch: int,
    base_keep_rate: float,
    start_epoch: float = 10,
    end_epoch: float = 110,
    num_patches: int | None = None,
    token_step: int | None = None,
) -> float:
    """Return the keep rate for a training step: 1 at first, a half cosine down, then the base keep rate.

    The schedule with which EViT was trained for 300 epochs (Liang et al., ICLR 2022, section 4).

    Under ``torch.compile`` every new keep rate compiles the model again, and torch stops compiling after a
    few (``torch._dynamo.config.recompile_limit``). With a `token_step`, the keep rate is rounded up to the
    next of the few of :func:`keep_rate_levels`: the first stage never keeps fewer patches than by the
    published schedule, and less than `token_step` more. Later stages may keep one fewer, where the first
    keeps as many as it does in the end but the published keep rate is not there yet.

    Args:
        step: number of optimizer steps done since the start of training, from 0.
        steps_per_epoch: optimizer steps in an epoch.
        base_keep_rate: the keep rate to arrive at, in (0, 1].
        start_epoch: the keep rate is 1 up to this epoch.
        end_epoch: the keep rate is `base_keep_rate` from this epoch on; with `start_epoch` equal to it the
            keep rate falls at once.
        num_patches: patches that enter the first stage, such as 196; needed for a `token_step`.
        token_step: by how many patches of the first stage the keep rate falls at once; None lets it fall at
            every step, as published.

    Returns:
        The keep rate, in [base_keep_rate, 1]: for :func:`evit_ext.set_keep_rate`.

    Raises:
        ValueError: an argument is out of range, or there is a `token_step` without `num_patches`.
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
        keep_rate = float(base_keep_rate)
    elif step < start:
        keep_rate = 1.0
    else:
        progress = (step - start) / (end - start)
        keep_rate = base_keep_rate + (1 - base_keep_rate) * (math.cos(math.pi * progress) + 1) / 2
    if token_step is None:
        return keep_rate
    if num_patches is None:
        raise ValueError(f"token_step {token_step} needs num_patches, the patches that enter the first stage")
    levels = keep_rate_levels(base_keep_rate, num_patches, token_step)
    kept = _kept(keep_rate, num_patches)
    return next(level for level in reversed(levels) if _kept(level, num_patches) >= kept)


def keep_rate_levels(base_keep_rate: float, num_patches: int, token_step: int) -> list[float]:
    """Return the keep rates that :func:`keep_rate_schedule` takes with a `token_step`, from 1 down.

    With them the first stage keeps N, N - token_step, N - 2 · token_step, … and at last
    K = ceil(base_keep_rate · N) of N patches; the other stages follow from the same keep rates. There are
    ceil((N - K) / token_step) + 1, and so many graphs does ``torch.compile`` make of a model that is trained
    along the schedule; see :func:`evit_ext.training.allow_recompiles`. For DeiT-S on images of 224 pixels
    (196 patches), with a `token_step` of 1, 8 and 16, that is 59, 9 and 5 for a base keep rate of 0.7, and
    99, 14 and 8 for 0.5.

    Args:
        base_keep_rate: the keep rate to arrive at, in (0, 1].
        num_patches: N, patches that enter the first stage.
        token_step: by how many patches of the first stage the keep rate falls at once.

    Returns:
        Keep rates, descending. The last is `base_keep_rate`, the first 1, unless they are the same.

    Raises:
        ValueError: an argument is out of range.
    """
    if not 0 < base_keep_rate <= 1:
        raise ValueError(f"base_keep_rate must be in (0, 1], got {base_keep_rate}")
    for name, value in (("num_patches", num_patches), ("token_step", token_step)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    least = _kept(base_keep_rate, num_patches)
    above = [_rate(kept, num_patches) for kept in range(num_patches, least, -token_step)]
    return [*above, float(base_keep_rate)]


def _kept(keep_rate: float, num_patches: int) -> int:
    """Return how many patches a stage keeps, as a reorganising block computes it."""
    return math.ceil(keep_rate * num_patches)


def _rate(kept: int, num_patches: int) -> float:
    """Return the largest keep rate with which `kept` of the patches are kept."""
    rate = kept / num_patches
    # The quotient is rounded: 7 / 25 * 25 is a little more than 7, and 8 patches would be kept.
    while _kept(rate, num_patches) > kept:
        rate = math.nextafter(rate, 0)
    return rate
