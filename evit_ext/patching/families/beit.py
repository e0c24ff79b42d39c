"""timm's Beit: BEiT, BEiT v2 and data2vec, whose attention has a bias for every pair of positions.

Once patches are dropped, every block needs the biases between the remaining tokens. As with rotary embeddings
(:mod:`evit_ext.patching.families.eva`), the model passes its blocks a :class:`TokenTrail`, and each block
uses it to gather the rows and columns of its bias. The bias then differs between images: [B, H, N, N] for
the N remaining tokens, where the unchanged model shares one [1, H, N, N].

A fused token has no position on the grid, nor has the class token, whose biases it uses.
"""

from __future__ import annotations

from typing import Any

from timm.layers import Mlp
from timm.models.beit import Attention, Beit, Block
from torch import Tensor, nn

from evit_ext.patching.attention import NOTHING_ELSE, Attended, Linear, Projected, Wants, attend
from evit_ext.patching.block import AdoptedBlock, ReorganizingBlock
from evit_ext.patching.families.family import Family
from evit_ext.patching.families.gamma import GammaBranches
from evit_ext.patching.families.timm_attention import TimmAttention, attention_forward, mlp_forward
from evit_ext.tokens.trail import TokenTrail


class BiasTrail(TokenTrail):
    """A trail that the blocks receive instead of their shared bias.

    Args:
        positions: the bias shared by all blocks, [H, N, N], or None.
    """

    def bias(self, attention: Any, stage: int) -> Tensor | None:
        """Return the bias that `attention` adds to its logits at `stage`: [B or 1, H, N, N], or None."""
        own = attention.relative_position_bias_table is not None
        bias: Tensor | None = attention._get_rel_pos_bias() if own else None  # [1, H, N, N]
        if self.positions is not None:
            bias = self.positions.unsqueeze(0) if bias is None else bias + self.positions
        patches = self.patches(stage)
        if bias is None or patches is None:
            return bias
        # The class token is token 0, patch i is token i + 1, and a fused token (-1) maps to the class token.
        tokens = nn.functional.pad(patches + 1, (1, 0))
        return bias[0, :, tokens[:, :, None], tokens[:, None, :]].transpose(0, 1)


class BeitAttention(TimmAttention):
    """BEiT's attention, whose own forward takes the tokens of a whole grid only."""

    def project(self, attention: Any, x: Tensor, linear: Linear, positions: Any) -> Projected:
        """See :meth:`AttentionKind.project`."""
        return super().project(attention, x, linear, None)

    def call(self, attention: Any, x: Tensor, positions: Any, bias: Tensor | None) -> Tensor:
        """See :meth:`AttentionKind.call`; the attention adds its own bias itself.

        While all patches are there, `positions` is the shared bias in a tuple.
        """
        if positions is None and attention.relative_position_bias_table is not None:
            raise RuntimeError(
                "hooks, or a forward that other code replaced, on an attention of BEiT cannot run on the "
                "tokens that are left: its bias is for all patches. Take them away, set the keep rate to 1, "
                "or call evit_ext.remove"
            )
        shared = bias if positions is None else positions[0]
        out: Tensor = attention(x, shared_rel_pos_bias=shared)
        return out

    def is_sdpa(self, attention: Any) -> bool:
        """See :meth:`AttentionKind.is_sdpa`; with a bias of its own, :meth:`weigh` does the rest."""
        return bool(attention.fused_attn) or attention.relative_position_bias_table is not None

    def weigh(self, attention: Any, projected: Projected, bias: Tensor | None) -> Tensor:
        """See :meth:`AttentionKind.weigh`."""
        if attention.fused_attn:
            return super().weigh(attention, projected, bias)
        q, k, v, _ = projected
        logits = q * attention.scale @ k.transpose(2, 3)
        weights = (logits if bias is None else logits + bias).softmax(dim=-1)
        out: Tensor = attention.attn_drop(weights) @ v
        return out


_ATTENTION = BeitAttention()


class _BeitBlock(GammaBranches, AdoptedBlock):
    """Shared by all blocks of a Beit that reorganises tokens."""

    def follow(self, x: Tensor, trail: BiasTrail, bias: Tensor | None) -> Tensor:
        """Return the replaced block's result for the remaining tokens."""
        if trail.patches(self.stage) is None and bias is None:
            return self.as_before(x, shared_rel_pos_bias=trail.positions)
        x = x + self.attention_branch(x, NOTHING_ELSE, trail, bias).out
        return x + self.mlp_branch(x, None)

    def attention_branch(
        self, x: Tensor, wants: Wants, positions: BiasTrail, bias: Tensor | None = None
    ) -> Attended:
        """See :meth:`ReorganizingBlock.attention_branch`."""
        whole = None
        if positions.patches(self.stage) is None and bias is None:
            whole = (positions.positions,)
        own = positions.bias(self.attn, self.stage)
        if own is not None:
            bias = own if bias is None else own + bias
        attended = attend(_ATTENTION, self.attn, self.norm1(x), wants, whole, bias)
        return attended._replace(out=self.scaled_attention(attended.out))


def _trail(shared_rel_pos_bias: Any) -> BiasTrail:
    """Return a block's argument as a trail: a block that is called directly receives a bias."""
    given = shared_rel_pos_bias
    return given if isinstance(given, BiasTrail) else BiasTrail(given)


class FollowingBeitBlock(_BeitBlock, Block):
    """A Beit block that does not drop tokens but uses the biases of those that reach it."""

    REPLACES = Block

    def forward(self, x: Tensor, shared_rel_pos_bias: Any = None) -> Tensor:
        """Return the replaced block's result for the remaining tokens."""
        return self.follow(x, _trail(shared_rel_pos_bias), self.carried(x).bias)


class ReorganizingBeitBlock(_BeitBlock, ReorganizingBlock, Block):
    """timm's BEiT ``Block`` with token reorganisation."""

    REPLACES = Block

    def forward(self, x: Tensor, shared_rel_pos_bias: Any = None) -> Tensor:
        """Return the reorganised tokens of `x`."""
        trail = _trail(shared_rel_pos_bias)
        return self.reorganize(x, lambda bias: self.follow(x, trail, bias), positions=trail, trail=trail)


class StartTrail(nn.Module):
    """Stands in for the shared bias of a Beit that has none; returns a new trail in every forward."""

    def set_window_size(self, window_size: tuple[int, int]) -> None:
        """Do nothing: there is no bias to resize."""

    def forward(self) -> BiasTrail:
        """Return a new trail."""
        return BiasTrail()


def _start_trail(module: nn.Module, arguments: tuple[()], bias: Tensor) -> BiasTrail:
    """Forward hook that makes the shared-bias module return a new trail in every forward."""
    return BiasTrail(bias)


def _has_positions(vit: Any) -> bool:
    """Return whether the blocks of a Beit have biases of their own or share one."""
    # The blocks have not been checked yet, so they can be of any class.
    attentions = (getattr(block, "attn", None) for block in vit.blocks)
    own = any(getattr(attn, "relative_position_bias_table", None) is not None for attn in attentions)
    return own or vit.rel_pos_bias is not None


def _install(vit: Any) -> None:
    """Make a Beit pass trails to its blocks."""
    if vit.rel_pos_bias is None:
        vit.rel_pos_bias = StartTrail().train(vit.training)
    else:
        vit.rel_pos_bias.register_forward_hook(_start_trail)


def _uninstall(vit: Any) -> None:
    """Undo :func:`_install`."""
    shared = vit.rel_pos_bias
    if isinstance(shared, StartTrail):
        # Assigning None without deleting would leave an entry among the submodules, visible in print(model).
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
    following={Block: FollowingBeitBlock},
    has_positions=_has_positions,
    install=_install,
    uninstall=_uninstall,
    cpu_forwards={Attention: attention_forward, Mlp: mlp_forward},
)
