"""Which patch each token of a forward is, stage by stage."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class TokenTrail:
    """Follows the patches of one forward through the stages.

    Patches are numbered as they enter the first block, row by row; -1 is a fused token, which has no position
    on the grid. A stage may be added twice, when gradient checkpointing computes a block again: the second
    time overwrites the first.

    Args:
        positions: the position information that the model passes to its blocks for all patches, such as
            rotary embeddings; each block takes the part for its own tokens.
        same_way: a trail of the same forward with other positions; the two share their stages.
    """

    def __init__(self, positions: Any = None, same_way: TokenTrail | None = None) -> None:
        self.positions = positions
        self._kept: dict[int, Tensor] = {} if same_way is None else same_way._kept
        self._sizes: dict[int, tuple[int, bool]] = {} if same_way is None else same_way._sizes
        self._patches: dict[int, Tensor] = {} if same_way is None else same_way._patches

    def add(self, stage: int, kept: Tensor, num_patches: int, fused: bool) -> None:
        """Add a stage.

        Args:
            stage: its number, from 0.
            kept: int64 [B, K], ascending, which of the patch tokens that entered the stage were kept.
            num_patches: how many patch tokens entered the stage.
            fused: whether the stage fused the others into one token, which then comes last.
        """
        patches = self.patches(stage)
        if patches is None:
            patches = torch.arange(num_patches, device=kept.device).expand(kept.shape[0], -1)
        # An earlier fused token is the last to enter, so if it is kept, its -1 stays last.
        patches = patches.gather(1, kept)
        self._sizes[stage] = (num_patches, fused)
        self._patches[stage] = F.pad(patches, (0, 1), value=-1) if fused else patches
        self._kept[stage] = kept  # last: from here on, it is one of `stages` for other threads

    def patches(self, stage: int) -> Tensor | None:
        """Return the patch numbers of the patch tokens that enter `stage`: int64 [B, N - P].

        None if they are all patches in order. `stage` can also be the number of stages, for the tokens that
        leave the last one.
        """
        before = [number for number in self._patches if number < stage]
        return self._patches[max(before)] if before else None

    def places(self, stage: int) -> Tensor | None:
        """Return which patch token represents each patch on entry to `stage`: int64 [B, patches].

        This is the patch's own token, or the fused token that it became part of; -1 if the patch is lost.
        None if all patches are present.
        """
        places: Tensor | None = None
        for number in (number for number in self.stages if number < stage):
            kept, num_patches, fused = self.step(number)
            num_keep = kept.shape[1]
            after = torch.full(
                (kept.shape[0], num_patches), num_keep if fused else -1, dtype=torch.int64, device=kept.device
            )
            after = after.scatter(1, kept, torch.arange(num_keep, device=kept.device).expand_as(kept))
            places = (
                after if places is None else torch.where(places < 0, -1, after.gather(1, places.clamp(min=0)))
            )
        return places

    def kept(self, stage: int) -> Tensor:
        """Return the patches that `stage` kept: int64 [B, K], -1 for fused tokens."""
        _, fused = self._sizes[stage]
        patches = self._patches[stage]
        return patches[:, :-1] if fused else patches

    @property
    def stages(self) -> list[int]:
        """The numbers of the stages that were added, ascending."""
        return sorted(self._kept)

    def step(self, stage: int) -> tuple[Tensor, int, bool]:
        """Return the `kept`, `num_patches` and `fused` that :meth:`add` was given for a stage."""
        return (self._kept[stage], *self._sizes[stage])
