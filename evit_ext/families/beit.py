"""timm's Beit: BEiT, BEiT v2 and data2vec, whose attention has a bias for every pair of places.

Once patches are dropped, every block needs the biases between the tokens that are left. As with rotary
embeddings (:mod:`evit_ext.families.eva`), the model hands its blocks a :class:`TokenTrail`, and every block
gathers rows and columns of its bias along. The bias then differs from image to image: [B, H, N, N] for the N
tokens that are left, where the unchanged model has [1, H, N, N] for all.

A fused token has no place on the grid. Its biases are those of the class token, which has none either.
"""

from __future__ import annotations

from typing import Any

from timm.layers import Mlp
from timm.models.beit import Attention, Beit, Block
from torch import Tensor, nn

from evit_ext.attention import Score, attend
from evit_ext.block import AdoptedBlock, ReorganizingBlock
from evit_ext.cpu_overrides import CpuAttention, CpuMlp
from evit_ext.families.family import Family
from evit_ext.families.gamma import GammaBranches
from evit_ext.trail import TokenTrail


class BiasTrail(TokenTrail):
    """A trail that is handed to the blocks in the place of the bias they share.

    Args:
        positions: the bias that all blocks share, [H, N, N], or None.
    """

    def bias(self, attention: Any, stage: int) -> Tensor | None:
        """Return what `attention` adds to its products at stage `stage`: [B or 1, H, N, N], or None."""
        own = attention.relative_position_bias_table is not None
        bias: Tensor | None = attention._get_rel_pos_bias() if own else None  # [1, H, N, N]
        if self.positions is not None:
            bias = self.positions.unsqueeze(0) if bias is None else bias + self.positions
        patches = self.patches(stage)
        if bias is None or patches is None:
            return bias
        # The class token is token 0, patch i is token i + 1, and a fused token, -1, is taken for the former.
        tokens = nn.functional.pad(patches + 1, (1, 0))
        return bias[0, :, tokens[:, :, None], tokens[:, None, :]].transpose(0, 1)


class _BeitBlock(GammaBranches, AdoptedBlock):
    """What the blocks of a Beit that reorganises tokens have in common."""

    def follow(self, x: Tensor, trail: BiasTrail) -> Tensor:
        """Return what the replaced block computes, of the tokens that are left."""
        if trail.patches(self.stage) is None:
            return self.as_before(x, shared_rel_pos_bias=trail.positions)
        x = x + self.attention_branch(x, _no_score, trail)[0]
        return x + self.mlp_branch(x, None)

    def attention_branch(self, x: Tensor, score: Score, positions: BiasTrail) -> tuple[Tensor, Tensor]:
        """See :meth:`ReorganizingBlock.attention_branch`."""
        bias = positions.bias(self.attn, self.stage)
        attended, scores = attend(self.attn, self.norm1(x), score, bias=bias)
        return self.scaled_attention(attended), scores


def _trail(shared_rel_pos_bias: Any) -> BiasTrail:
    """Return what a block is handed as a trail: a block that is called by itself is handed a bias."""
    given = shared_rel_pos_bias
    return given if isinstance(given, BiasTrail) else BiasTrail(given)


def _no_score(q: Tensor, k: Tensor, bias: Tensor | None) -> Tensor:
    """Return anything, where nobody wants scores."""
    return q


class FollowingBeitBlock(_BeitBlock):
    """A Beit block with the biases between the tokens that are left where it stands."""

    def forward(self, x: Tensor, shared_rel_pos_bias: Any = None) -> Tensor:
        """Return what the replaced block computes, of the tokens that are left."""
        return self.follow(x, _trail(shared_rel_pos_bias))


class ReorganizingBeitBlock(_BeitBlock, ReorganizingBlock):
    """timm's BEiT ``Block`` with token reorganisation."""

    def forward(self, x: Tensor, shared_rel_pos_bias: Any = None) -> Tensor:
        """Return the reorganised tokens of `x`."""
        trail = _trail(shared_rel_pos_bias)
        return self.reorganize(x, lambda: self.follow(x, trail), positions=trail, trail=trail)


class StartTrail(nn.Module):
    """Where a Beit has no bias that its blocks share: hands out a new trail with every forward."""

    def set_window_size(self, window_size: tuple[int, int]) -> None:
        """Change nothing: there is no bias whose size it would be."""

    def forward(self) -> BiasTrail:
        """Return a new trail."""
        return BiasTrail()


def _start_trail(module: nn.Module, arguments: tuple[()], bias: Tensor) -> BiasTrail:
    """As a forward hook, make the module of the shared bias hand out a trail with every forward."""
    return BiasTrail(bias)


def _has_positions(vit: Any) -> bool:
    """Return whether the blocks of a Beit have biases, or are told them."""
    # Asked before the blocks are checked, which may be anything.
    attentions = (getattr(block, "attn", None) for block in vit.blocks)
    own = any(getattr(attn, "relative_position_bias_table", None) is not None for attn in attentions)
    return own or vit.rel_pos_bias is not None


def _install(vit: Any) -> None:
    """Make a Beit hand trails to its blocks."""
    if vit.rel_pos_bias is None:
        vit.rel_pos_bias = StartTrail()
    else:
        vit.rel_pos_bias.register_forward_hook(_start_trail)


def _uninstall(vit: Any) -> None:
    """Undo :func:`_install`."""
    shared = vit.rel_pos_bias
    if isinstance(shared, StartTrail):
        # Assigned at once, None would stay among the submodules, and be seen when the model is printed.
        del vit.rel_pos_bias
        vit.rel_pos_bias = None
    elif shared is not None:
        for handle, hook in list(shared._forward_hooks.items()):
            if hook is _start_trail:
                del shared._forward_hooks[handle]


FAMILY = Family(
    name="timm's Beit",
    model=Beit,
    blocks={Block: ReorganizingBeitBlock},
    attentions=(Attention,),
    following=FollowingBeitBlock,
    has_positions=_has_positions,
    install=_install,
    uninstall=_uninstall,
    cpu_forwards={Attention: CpuAttention, Mlp: CpuMlp},
)
