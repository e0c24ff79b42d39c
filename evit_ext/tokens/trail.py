"""Which patch each token of a forward is, stage by stage."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from evit_ext.tokens.plan import Plan


class TokenTrail:
    """Follows the patches of one forward through the stages.

    Patches are numbered as they enter the first block, row by row; −1 is a token made of several patches,
    which has no position on the grid. A stage may be added twice, when gradient checkpointing computes a
    block again: the second time overwrites the first.

    Args:
        positions: the position information that the model passes to its blocks for all patches, such as
            rotary embeddings; each block takes the part for its own tokens.
        same_way: a trail of the same forward with other positions; the two share their stages.
        image_patches: the patch tokens that entered the first stage, for a trail that begins after it.
    """

    def __init__(
        self,
        positions: Any = None,
        same_way: TokenTrail | None = None,
        image_patches: int | None = None,
    ) -> None:
        self.positions = positions
        self._image_patches = image_patches
        self._plans: dict[int, Plan] = {} if same_way is None else same_way._plans
        self._patches: dict[int, Tensor] = {} if same_way is None else same_way._patches

    def add(self, stage: int, plan: Plan) -> None:
        """Add what stage number `stage`, from 0, did."""
        kept = plan.kept
        patches = self.patches(stage)
        if patches is None:
            patches = torch.arange(plan.num_patches, device=kept.device).expand(kept.shape[0], -1)
        # An earlier made token comes after the patches, so if it is kept, its −1 stays there.
        patches = patches.gather(1, kept)
        self._patches[stage] = F.pad(patches, (0, plan.num_made), value=-1) if plan.num_made else patches
        self._plans[stage] = plan.settled()  # last: from here on, it is one of `stages` for other threads

    def num_image_patches(self, num_patches: int) -> int:
        """Return how many patch tokens entered the first stage: `num_patches` if there was none yet."""
        if self._image_patches is not None:
            return self._image_patches
        return self._plans[min(self._plans)].num_patches if self._plans else num_patches

    def patches(self, stage: int) -> Tensor | None:
        """Return the patch numbers of the patch tokens that enter `stage`: int64 [B, N − P].

        None if they are all patches in order. `stage` can also be the number of stages, for the tokens that
        leave the last one.
        """
        before = [number for number in self._patches if number < stage]
        return self._patches[max(before)] if before else None

    def places(self, stage: int) -> Tensor | None:
        """Return which patch token represents each patch on entry to `stage`: int64 [B, patches].

        This is the patch's own token, or one that it became part of; −1 if the patch is lost. None if all
        patches are present.
        """
        places: Tensor | None = None
        for number in (number for number in self.stages if number < stage):
            owner = self._plans[number].owner
            places = (
                owner if places is None else torch.where(places < 0, -1, owner.gather(1, places.clamp(min=0)))
            )
        return places

    def kept(self, stage: int) -> Tensor:
        """Return the patches that `stage` kept: int64 [B, K], −1 for made tokens of earlier stages."""
        return self._patches[stage][:, : self._plans[stage].kept.shape[1]]

    @property
    def stages(self) -> list[int]:
        """The numbers of the stages that were added, ascending."""
        return sorted(self._plans)

    def plan(self, stage: int) -> Plan:
        """Return what a stage did."""
        return self._plans[stage]
