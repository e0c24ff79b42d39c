"""What a rule decided for the tokens of a batch: which token stands for which.

Notation: B batch, N tokens, P prefix tokens, K kept patches, M patch tokens that leave, C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from evit_ext import ops


class Plan:
    """Which of the patch tokens that leave a block stands for each one that enters it.

    The tokens that leave are, in order: the prefix tokens, K kept patch tokens, and any that were made of
    several. A token that was made has no place on the image's grid.

    Args:
        kept: int64 [B, K], which patch token each of the kept ones is, ascending.
        num_patches: N − P, the patch tokens that enter.
        num_made: how many tokens come after the kept ones.
        owner: int64 [B, N − P], see :attr:`owner`; by default each kept token stands for itself, and the
            last one, if any was made, for all others.
        scores: [B, N − P], what the rule ranked the patch tokens by; None if it ranked none.
        complete: there is a token that stands for each in a given `owner`, which has no −1.
    """

    def __init__(
        self,
        kept: Tensor,
        num_patches: int,
        num_made: int = 0,
        owner: Tensor | None = None,
        scores: Tensor | None = None,
        complete: bool = False,
    ) -> None:
        if owner is None and num_made > 1:
            raise ValueError(f"a plan that makes {num_made} tokens must say by owner which they stand for")
        self.kept = kept
        self.num_patches = num_patches
        self.num_made = num_made
        self.scores = scores
        self.complete = complete
        self._given_owner = owner

    @property
    def owner(self) -> Tensor:
        """For each patch token that enters, the number of the one that stands for it among those that leave.

        int64 [B, N − P], from 0 (prefix tokens are not counted); −1 for a token that nothing stands for.
        """
        if self._given_owner is not None:
            return self._given_owner
        kept = self.kept
        last = kept.shape[1] + self.num_made - 1 if self.num_made else -1
        others = torch.full((kept.shape[0], self.num_patches), last, dtype=kept.dtype, device=kept.device)
        places = torch.arange(kept.shape[1], device=kept.device).expand_as(kept)
        return others.scatter(1, kept, places)

    @property
    def num_kept(self) -> int:
        """K."""
        return self.kept.shape[1]

    @property
    def num_out(self) -> int:
        """M, how many patch tokens leave."""
        return self.num_kept + self.num_made

    @property
    def represents_all(self) -> bool:
        """Whether every patch token that enters has one that stands for it; False if some may have none."""
        return self.keeps_all or (self._given_owner is None and self.num_made > 0) or self.complete

    @property
    def keeps_all(self) -> bool:
        """Whether every patch token goes on as it is."""
        return self.kept.shape[1] == self.num_patches

    def apply(self, x: Tensor, num_prefix_tokens: int) -> Tensor:
        """Return the tokens that leave.

        A made token, and a kept one that stands for others too, is the mean of all it stands for. Rules that
        weight them otherwise override this.

        Args:
            x: tokens [B, N, C].
            num_prefix_tokens: P.

        Returns:
            [B, P + M, C], dtype of `x`.
        """
        prefix = num_prefix_tokens
        if self.num_made == 0 and self._given_owner is None:
            first = torch.arange(prefix, device=x.device).expand(x.shape[0], -1)
            return ops.gather_tokens(x, torch.cat([first, self.kept + prefix], dim=1))
        num_out = self.num_out
        # One row more, for tokens that nothing stands for.
        owner = torch.where(self.owner < 0, num_out, self.owner)
        patches = x[:, prefix:]
        sums = ops.scatter_tokens(patches, owner, num_out + 1)[:, :num_out]
        counts = ops.scatter_tokens(torch.ones_like(patches[:, :, :1]), owner, num_out + 1)[:, :num_out]
        return torch.cat([x[:, :prefix], sums / counts.clamp(min=1)], dim=1)

    def add_apply_norm(
        self, x: Tensor, branch: Tensor, num_prefix_tokens: int, norm: nn.LayerNorm
    ) -> tuple[Tensor, Tensor] | None:
        """Return the tokens that leave ``x + branch`` and their norm, if one operator does it all.

        Called without gradients only, and only where `norm` is a plain LayerNorm.

        Args:
            x: tokens [B, N, C].
            branch: what is added to them, [B, N, C].
            num_prefix_tokens: P.
            norm: of the tokens that leave.

        Returns:
            Both [B, P + M, C]; or None, and :meth:`apply` is called.
        """
        return None

    def merged_sizes(self, sizes: Tensor | None, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return of how many patches each patch token that leaves is made.

        Args:
            sizes: of those that enter, [B, N − P]; None if each is one.
            dtype, device: of the result.

        Returns:
            [B, M]; a token that stands for none is of size 1.
        """
        if sizes is None:
            sizes = torch.ones((self.kept.shape[0], self.num_patches), dtype=dtype, device=device)
        owner, num_out = self.owner, self.num_out
        if not self.represents_all:
            owner = torch.where(owner < 0, num_out, owner)
        sums = ops.scatter_tokens(sizes.to(dtype).unsqueeze(2), owner, num_out + 1)[:, :num_out, 0]
        return sums.clamp(min=1)

    def settled(self) -> Plan:
        """Return the plan without the tokens that it may hold on to."""
        return self

    def restore(self, patches: Tensor, fill: str | Tensor = "fused") -> Tensor:
        """Put tokens back where the patch tokens came from.

        Args:
            patches: values of the patch tokens that leave, [B, M, C].
            fill: the value of a token that is not among the kept ones: "fused", that of the token that
                stands for it; "zero"; or its own value in a tensor [B, N − P, C]. Where nothing stands for a
                token, "fused" is an error.

        Returns:
            [B, N − P, C].
        """
        if self.keeps_all:
            return patches
        if self._given_owner is None:
            return ops.restore_tokens(patches, self.kept, self.num_patches, num_prefix_tokens=0, fill=fill)
        owner = self.owner
        of_owner = ops.gather_tokens(patches, owner.clamp(min=0))
        if isinstance(fill, str) and fill == "fused":
            if not self.represents_all:
                raise ValueError("fill='fused' needs a token that stands for each, but the plan drops some")
            return of_owner
        is_kept = torch.zeros_like(owner, dtype=torch.bool).scatter(1, self.kept, True).unsqueeze(2)
        others = torch.zeros_like(of_owner) if isinstance(fill, str) else fill
        return torch.where(is_kept, of_owner, others)
