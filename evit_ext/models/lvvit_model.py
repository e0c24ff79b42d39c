"""The LV-ViT model: scaled residuals, a head for every token, MixToken.

LV-ViT is by Jiang et al., "All Tokens Matter: Token Labeling for Training Better Vision Transformers"
(NeurIPS 2021, arXiv 2104.10858). Layer options and state-dict keys are those of its published code
(github.com/zihangJiang/TokenLabeling). Of EViT-LV-ViT no code was published; what its authors say of it
(github.com/youweiliang/evit, issue 13) is that the tokens left at the end are supervised, but not the fused
one.

Notation: B batch, N tokens, P prefix tokens, K tokens after the prefix at the end, C channels.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm, trunc_normal_
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from evit_ext._util.messages import shown
from evit_ext._util.wrappers import unwrapped
from evit_ext.models.deit_model import DeiT
from evit_ext.models.lvvit_stem import ConvStem
from evit_ext.models.mix_token import draw_exchanged
from evit_ext.tokens.stage import Stage, find_stages
from evit_ext.tokens.trail import TokenTrail


class ResidualScale(nn.Module):
    """LV-ViT's residual scaling: divides what a branch adds to the tokens by `skip_lam`. No parameters."""

    def __init__(self, skip_lam: float) -> None:
        super().__init__()
        self.skip_lam = skip_lam

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` [B, N, C] divided."""
        return x / self.skip_lam

    def extra_repr(self) -> str:
        """Return the setting for ``print(model)``."""
        return f"skip_lam={self.skip_lam}"


def scaled_block(*args: Any, skip_lam: float, **kwargs: Any) -> Block:
    """Return timm's Block with scaled residuals in the place of layer scale.

    The published block divides after stochastic depth, this one before, which is the same. It being timm's
    Block, everything that reorganises tokens takes it as it is.
    """
    if kwargs.get("init_values") is not None:
        raise ValueError("LV-ViT scales its residuals with skip_lam: init_values is not for it")
    block = Block(*args, **kwargs)
    if skip_lam != 1:
        block.ls1 = ResidualScale(skip_lam)  # type: ignore[assignment]
        block.ls2 = ResidualScale(skip_lam)  # type: ignore[assignment]
    return block


class TokenLabelOutput(NamedTuple):
    """What an LV-ViT with an auxiliary head returns in training.

    Attributes:
        logits: [B, classes], from the class token.
        aux_logits: [B, K, classes], from the K tokens that are left after the prefix.
        patches: int64 [B, K], the patch that each of them is, counted row by row; -1 for a fused token, which
            is to be left out of the loss. Images keep different patches.
        images: int64 [B, K], the image of the batch that the patch was taken from: b, but B - 1 - b where
            MixToken exchanged it. So the label of token k is that of ``patches[b, k]`` in ``images[b, k]``.
        own_share: float32 scalar, the share of all patches that MixToken left alone, which is the weight of
            image b's label among those of the class token; the rest is for image B - 1 - b.
    """

    logits: Tensor
    aux_logits: Tensor
    patches: Tensor
    images: Tensor
    own_share: Tensor


class LVViT(DeiT):
    """LV-ViT as a timm VisionTransformer: convolutional stem, scaled residuals, a head for every token.

    In eval mode, and with ``num_classes=0``, the forward returns a tensor:

    * logits [B, classes]: those of the class token plus half the largest auxiliary logit that any patch has
      for the class, as published. Fused tokens do not count there: they have no label, so the auxiliary head
      never learns to classify them. An image with nothing but fused tokens left gets the class token's
      logits.
    * the class token's features [B, C] with ``num_classes=0``.

    In training mode it returns a :class:`TokenLabelOutput`, or, without the auxiliary head, logits
    [B, classes].

    The published code undoes MixToken's exchange in the auxiliary logits and returns the box. That is not
    possible when patches are dropped, because the other image may have dropped its own. So the logits here
    stay mixed, and the output says where each patch came from.

    Args:
        skip_lam: what the branches of a block are divided by before they are added.
        stem_dim: channels of the stem's convolutions.
        return_dense: have the auxiliary head (state-dict keys ``aux_head.*``).
        mix_token: in training, exchange a box of patches between images, with an area of λ ~ Beta(1, 1).
        arguments: as of timm's VisionTransformer, but for what LV-ViT fixes.

    Raises:
        ValueError: an argument is out of range or goes against LV-ViT.
    """

    aux_head: nn.Module | None

    def __init__(
        self,
        *,
        skip_lam: float = 1.0,
        stem_dim: int = 64,
        return_dense: bool = True,
        mix_token: bool = True,
        **arguments: Any,
    ) -> None:
        if mix_token and not return_dense:
            raise ValueError(
                "mix_token=True needs return_dense=True: the mixed patches are what it supervises"
            )
        if not skip_lam > 0:
            raise ValueError(f"skip_lam must be positive, got {skip_lam}")
        if arguments.get("global_pool", "token") != "token":
            raise ValueError(
                f"LV-ViT's heads are for tokens: no global_pool={shown(arguments['global_pool'])}"
            )
        if arguments.get("patch_drop_rate", 0) > 0:
            raise ValueError("patch_drop_rate would drop patches without telling which; LV-ViT labels each")
        # The published norms have PyTorch's eps, not that of timm's VisionTransformer.
        norm_layer = partial(LayerNorm, eps=1e-5)
        arguments = {"mlp_ratio": 3.0, "qkv_bias": False, "norm_layer": norm_layer, **arguments}
        super().__init__(
            embed_layer=partial(ConvStem, stem_dim=stem_dim),
            block_fn=partial(scaled_block, skip_lam=skip_lam),  # type: ignore[arg-type]
            **arguments,
        )
        self.in_chans = self.patch_embed.conv1.in_channels
        self.mix_token = mix_token
        self.return_dense = return_dense
        self.aux_head = None
        if return_dense:
            self._add_aux_head()
        if arguments.get("weight_init") != "skip" and self.cls_token is not None:
            trunc_normal_(self.cls_token, std=0.02)

    def _add_aux_head(self) -> None:
        if self.num_classes == 0:
            self.aux_head = nn.Identity()
            return
        head = nn.Linear(self.embed_dim, self.num_classes).to(self.cls_token)
        trunc_normal_(head.weight, std=0.02)
        nn.init.zeros_(head.bias)
        self.aux_head = head.train(self.training)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace both heads by new ones for `num_classes`; ValueError for any pooling but the token's."""
        # timm's features_only says "", the features as they are, with no classes.
        if global_pool not in (None, "token") and (global_pool != "" or num_classes > 0):
            raise ValueError(f"LV-ViT's heads are for tokens: no global_pool={shown(global_pool)}")
        super().reset_classifier(num_classes)
        if self.return_dense:
            self._add_aux_head()

    def forward_tokens(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the last tokens of images `x` and which patches they are; without MixToken.

        Args:
            x: [B, channels, height, width].

        Returns:
            The normalised tokens [B, P + K, C], and int64 [B, K], the patch of each after the prefix, -1 for
            a fused token.
        """
        return self._tokens(self.patch_embed(x))

    def _tokens(self, embedded: Tensor) -> tuple[Tensor, Tensor]:
        """As :meth:`forward_tokens`, of what comes out of the stem."""
        x = self.norm_pre(self._pos_embed(embedded))
        num_patches = x.shape[1] - self.num_prefix_tokens
        # Not len(x), which torch.export takes for a constant.
        patches = torch.arange(num_patches, device=x.device).expand(x.shape[0], -1)
        for block in self.blocks:
            if self.grad_checkpointing and torch.is_grad_enabled():
                x, kept = checkpoint(_run, block, x, num_patches, use_reentrant=False)
            else:
                x, kept = _run(block, x, num_patches)
            if kept is not None:
                patches = patches.gather(1, kept)
                num_made = x.shape[1] - self.num_prefix_tokens - kept.shape[1]
                patches = F.pad(patches, (0, num_made), value=-1)
        return self.norm(x), patches

    def forward_features(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Return the last tokens [B, P + K, C] of images `x`."""
        return self.forward_tokens(x)[0]

    def forward_head(self, x: Tensor, pre_logits: bool = False, patches: Tensor | None = None) -> Tensor:
        """Return the logits that eval mode returns, of the last tokens.

        Args:
            x: tokens [B, P + K, C].
            pre_logits: return the class token's features [B, C].
            patches: which patches they are, as :meth:`forward_tokens` says; not needed where no token is
                fused.

        Raises:
            ValueError: tokens may be fused, and `patches` was not given.
        """
        if patches is None and self._may_fuse() and self.return_dense and not pre_logits:
            raise ValueError("which tokens are fused is not seen from them: give patches, of forward_tokens")
        x = self.head_drop(x)
        features = x[:, 0]
        if pre_logits or self.num_classes == 0:
            return features
        logits = self.head(features)
        if self.aux_head is None:
            return logits
        aux_logits = self.aux_head(x[:, self.num_prefix_tokens :])
        if patches is None or not self._may_fuse():
            return logits + 0.5 * aux_logits.amax(dim=1)
        fused = (patches < 0).unsqueeze(2)
        best = aux_logits.masked_fill(fused, -torch.inf).amax(dim=1)
        return logits + 0.5 * best.masked_fill(fused.all(dim=1), 0)

    def _may_fuse(self) -> bool:
        """Return whether some of the last tokens may be no patch of the image."""
        patches = self.patch_embed.num_patches
        return any(
            stage.rule.num_out(patches, patches) > (kept := stage.rule.num_kept(patches, patches))
            or (stage.rule.fuses and kept < patches)
            for stage in find_stages(self)
        )

    def forward(self, x: Tensor) -> Tensor | TokenLabelOutput:  # type: ignore[override]
        """Return logits, features or a :class:`TokenLabelOutput`; see the class.

        Args:
            x: images [B, channels, height, width].
        """
        x = self.patch_embed(x)
        exchanged: Tensor | None = None
        if self.mix_token and self.training:
            # The stem's output is [B, N, C] or, for images of any size, [B, rows, columns, C].
            rows, columns = self.patch_embed.grid_size if x.dim() == 3 else (x.shape[1], x.shape[2])
            exchanged = draw_exchanged(rows, columns, x.device)
            x = torch.where(exchanged.reshape(*x.shape[1:-1], 1), x.flip(0), x)
        x, patches = self._tokens(x)
        if not self.training or self.aux_head is None or self.num_classes == 0:
            return self.forward_head(x, patches=patches)
        x = self.head_drop(x)
        images = torch.arange(x.shape[0], device=x.device).unsqueeze(1).expand(patches.shape)
        own_share = torch.ones((), device=x.device)
        if exchanged is not None:
            images = torch.where(exchanged[patches] & (patches >= 0), images.flip(0), images)
            own_share = 1 - exchanged.float().mean()
        aux_logits = self.aux_head(x[:, self.num_prefix_tokens :])
        return TokenLabelOutput(self.head(x[:, 0]), aux_logits, patches, images, own_share)


def _run(block: nn.Module, x: Tensor, num_patches: int) -> tuple[Tensor, Tensor | None]:
    """Run a block; also return which patch tokens it kept, int64 [B, K], or None where it kept all.

    A trail of its own, as torch.compile takes none that a checkpointed block changes.
    """
    if not isinstance(unwrapped(block), Stage):
        return block(x), None
    trail = TokenTrail(image_patches=num_patches)
    x = block(x, trail=trail)
    return x, trail.plan(trail.stages[0]).kept if trail.stages else None
