"""Larger images, fewer patches: which sizes of images and keep rates fit a budget of multiply-accumulates."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from evit_ext._util.messages import shown
from evit_ext.cost.macs import count_macs
from evit_ext.models.by_name import create_dense, create_evit
from evit_ext.patching.keep_rates import set_keep_rate
from evit_ext.tokens.stage import find_stages

#: From 1, where nothing is dropped, to the lowest keep rate in the paper.
KEEP_RATES = tuple(percent / 100 for percent in range(100, 45, -5))

#: The largest budget: DeiT-T at about 3,000 pixels. For more, many hundred sizes would be tried.
MOST_MACS = 10**13

#: By what share a cost may be above the budget: costs are published to three digits or fewer.
TOLERANCE = 0.01


class BudgetFit(NamedTuple):
    """A size of images, the highest keep rate at which a model's cost for it fits, and that cost.

    Attributes:
        img_size: height and width of the images in pixels.
        keep_rate: share of the patches that a stage keeps.
        macs: multiply-accumulates of one image, as :func:`evit_ext.count_macs` counts them.
    """

    img_size: int
    keep_rate: float
    macs: int


def fit_budget(
    model: str,
    macs: float | str,
    keep_rates: Sequence[float] = KEEP_RATES,
    tolerance: float = TOLERANCE,
    **arguments: Any,
) -> list[BudgetFit]:
    """Return the sizes of images, and for each the highest keep rate, that a budget allows.

    What EViT saves can be spent on larger images: the paper (Liang et al., ICLR 2022, section 4) has DeiT-S
    at 256, 272, 288 and 304 pixels with keep rates 0.8, 0.7, 0.6 and 0.5, for what it costs at 224 with all
    patches. Sizes are multiples of the patch size, from the largest that fits with the highest of
    `keep_rates` to the largest that fits with the lowest. Nothing is computed: the model is built on the meta
    device.

    Args:
        model: its name in :mod:`evit_ext.models` or timm's registry.
        macs: the budget: multiply-accumulates of one image (4.6e9 for 4.6 GMACs), or the name of a model, for
            what that model costs with all patches.
        keep_rates: to choose from, each in (0, 1].
        tolerance: share of the budget, in [0, 1], by which a cost may be above it. DeiT-S at 256 and keep
            rate 0.8 has 4.61 GMACs, at 224 with all patches 4.60.
        arguments: of the model, such as ``drop_loc``, ``fuse_token`` and ``num_classes``.

    Returns:
        The settings that fit, the one that uses most of the budget first.

    Raises:
        TypeError, ValueError: the model cannot be built, an argument is out of range, or not even the
            smallest image fits.

    Example:
        >>> [(fit.img_size, fit.keep_rate) for fit in evit_ext.fit_budget("deit_small", "deit_small")]
        [(256, 0.8), (224, 1.0), (272, 0.7), (288, 0.6), (304, 0.5), (240, 0.85)]
    """
    rates = sorted(set(keep_rates), reverse=True)
    if not rates:
        raise ValueError("keep_rates must be some numbers in (0, 1], got none")
    if not 0 <= tolerance <= 1:
        raise ValueError(f"tolerance must be in [0, 1], a share of the budget, got {tolerance}")
    budget = cost_of(macs) if isinstance(macs, str) else macs
    if isinstance(budget, bool) or not isinstance(budget, numbers.Real):
        raise TypeError(
            f"macs must be a number of multiply-accumulates or a model's name, got {shown(budget)}"
        )
    if not 0 < budget <= MOST_MACS:
        raise ValueError(
            f"macs must be positive multiply-accumulates of one image, at most {MOST_MACS:g}, got {budget}"
        )
    costs = _Costs(model, arguments)
    most = budget * (1 + tolerance)
    size = costs.largest(rates[0], most)
    found = []
    for rate in rates:
        # Larger images need lower keep rates: none above the one that the last size had to take can fit.
        while (cost := costs(size, rate)) <= most:
            found.append(BudgetFit(size, rate, cost))
            size += costs.patch_size
    return sorted(found, key=lambda fit: (-fit.macs, -fit.img_size))


def cost_of(model: str) -> int:
    """Return the multiply-accumulates of a model by name, for images of its own size, with all patches.

    Args:
        model: its name in :mod:`evit_ext.models` or timm's registry, also one that cannot be an EViT.

    Raises:
        ValueError: there is no such model.
    """
    with torch.device("meta"):
        dense = create_dense(model).eval()
    if find_stages(dense):
        set_keep_rate(dense, 1.0)
    return count_macs(dense)


class _Costs:
    """What a model costs for images of any size, at any keep rate."""

    def __init__(self, name: str, arguments: dict[str, Any]) -> None:
        self._name = name
        self._arguments = arguments
        self._model: Any = None
        self._built_for: int | None = None
        self._known: dict[tuple[int, float], int] = {}
        own = self._build()
        self.patch_size = int(own.patch_embed.feat_ratio())
        self._own_size = int(max(own.patch_embed.img_size or (224,)))

    def _build(self, **size: int) -> Any:
        with torch.device("meta"):
            return create_evit(self._name, **{**self._arguments, **size}).eval()

    def __call__(self, size: int, keep_rate: float) -> int:
        """Return the multiply-accumulates of an image of size × size."""
        if (size, keep_rate) not in self._known:
            if size != self._built_for:
                self._model, self._built_for = self._build(img_size=size), size
            set_keep_rate(self._model, keep_rate)
            self._known[size, keep_rate] = count_macs(self._model, size)
        return self._known[size, keep_rate]

    def largest(self, keep_rate: float, macs: float) -> int:
        """Return the largest size that costs `macs` or less; ValueError if there is none."""
        step = self.patch_size
        size = max(step, self._own_size // step * step)
        for _ in range(8):  # the cost grows a little faster than the number of patches: a few steps will do
            guess = max(step, int(size * math.sqrt(macs / self(size, keep_rate))) // step * step)
            if guess == size:
                break
            size = guess
        while self(size, keep_rate) > macs:
            if size == step:
                raise ValueError(
                    f"{self._name} needs {self(size, keep_rate) / 1e9:.3g} GMACs at keep rate {keep_rate:g} "
                    f"for an image of one patch, {size} pixels, more than the budget"
                )
            size -= step
        while self(size + step, keep_rate) <= macs:
            size += step
        return size
