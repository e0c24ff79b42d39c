"""LV-ViT with token reorganisation: the EViT paper's other model, with what token labelling needs.

LV-ViT is by Jiang et al., "All Tokens Matter: Token Labeling for Training Better Vision Transformers"
(NeurIPS 2021, arXiv 2104.10858). Sizes, layer options and state-dict keys are those of its published code
(github.com/zihangJiang/TokenLabeling). Of EViT-LV-ViT no code was published; what its authors say of it
(github.com/youweiliang/evit, issue 13) is that the tokens left at the end are supervised, but not the fused
one.

Notation: B batch, N tokens, P prefix tokens, K tokens after the prefix at the end, C channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
from timm.layers import LayerNorm, PatchEmbed, trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from evit_ext.apply import apply, check_arguments
from evit_ext.block import ReorganizingBlock
from evit_ext.families import reorganizing_blocks
from evit_ext.models.deit import DeiT, is_connection_error

_SIZES: dict[str, dict[str, Any]] = {
    "t": {"embed_dim": 240, "depth": 12, "num_heads": 4, "skip_lam": 1.0},
    "s": {"embed_dim": 384, "depth": 16, "num_heads": 6, "skip_lam": 2.0},
    "m": {"embed_dim": 512, "depth": 20, "num_heads": 8, "skip_lam": 2.0},
    "l": {"embed_dim": 768, "depth": 24, "num_heads": 12, "skip_lam": 3.0, "stem_dim": 128},
}

_RELEASE = "https://github.com/zihangJiang/TokenLabeling/releases/download/1.0/"


def _cfg(url: str = "", crop_pct: float = 0.9) -> dict[str, Any]:
    return {
        "url": url,
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": None,
        "crop_pct": crop_pct,
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "patch_embed.conv1",
        "classifier": ("head", "aux_head"),
    }


# No weights were published for the tiny model, and for the large one not for 224 pixels.
default_cfgs = generate_default_cfgs(
    {
        "evit_lvvit_t_patch16_224.in1k": _cfg(),
        "evit_lvvit_s_patch16_224.in1k": _cfg(f"{_RELEASE}lvvit_s-26M-224-83.3.pth.tar"),
        "evit_lvvit_m_patch16_224.in1k": _cfg(f"{_RELEASE}lvvit_m-56M-224-84.0.pth.tar", crop_pct=1.0),
        "evit_lvvit_l_patch16_224.in1k": _cfg(crop_pct=1.0),
    }
)


class ConvStem(PatchEmbed):
    """LV-ViT's patch embedding: three convolutions with batch norm and ReLU, then the projection of patches.

    The first convolution halves the image, the projection's kernel is half a patch. Input [B, channels,
    height, width]; output [B, N, C], or [B, rows, columns, C] with ``output_fmt="NHWC"``.

    Args:
        patch_size: even.
        stem_dim: channels of the three convolutions.
        others: as of timm's PatchEmbed.

    Raises:
        ValueError: `patch_size` is odd; in the forward, the image has a size that does not fit.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        stem_dim: int = 64,
        device: Any = None,
        dtype: Any = None,
        **others: Any,
    ) -> None:
        factory = {"device": device, "dtype": dtype}
        if not isinstance(patch_size, int) or patch_size < 2 or patch_size % 2:
            raise ValueError(
                f"patch_size must be an even number, as LV-ViT's stem halves the image, got {patch_size!r}"
            )
        super().__init__(img_size, patch_size, in_chans, embed_dim, **others)
        self.conv1 = nn.Conv2d(in_chans, stem_dim, 7, stride=2, padding=3, bias=False, **factory)
        self.bn1 = nn.BatchNorm2d(stem_dim, **factory)
        self.conv2 = nn.Conv2d(stem_dim, stem_dim, 3, padding=1, bias=False, **factory)
        self.bn2 = nn.BatchNorm2d(stem_dim, **factory)
        self.conv3 = nn.Conv2d(stem_dim, stem_dim, 3, padding=1, bias=False, **factory)
        self.bn3 = nn.BatchNorm2d(stem_dim, **factory)
        half, bias = patch_size // 2, self.proj.bias is not None
        self.proj = nn.Conv2d(stem_dim, embed_dim, half, stride=half, bias=bias, **factory)

    def set_input_size(self, img_size: Any = None, patch_size: Any = None) -> None:
        """Change the image size that the model is built for; ValueError for another patch size."""
        if patch_size is not None and patch_size not in (self.patch_size, self.patch_size[0]):
            raise ValueError(f"the patch size of LV-ViT's stem cannot be changed to {patch_size}")
        super().set_input_size(img_size=img_size)

    def forward(self, x: Tensor) -> Tensor:
        """Return the patches of images `x`."""
        height, width = x.shape[2:]
        rows, columns = self.patch_size
        if self.strict_img_size and self.img_size is not None and (height, width) != self.img_size:
            raise ValueError(
                f"the images are {height} × {width}, the model was built for {self.img_size[0]} × "
                f"{self.img_size[1]}: give img_size, or dynamic_img_size=True"
            )
        if self.dynamic_img_pad:
            x = F.pad(x, (0, -width % columns, 0, -height % rows))
        elif height % rows or width % columns:
            raise ValueError(
                f"the images are {height} × {width}, no multiple of the patch, {rows} × {columns}"
            )
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.relu(self.bn3(self.conv3(x)))
        x = self.proj(x)
        x = x.flatten(2).transpose(1, 2) if self.flatten else x.permute(0, 2, 3, 1)
        return self.norm(x)


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


def _scaled_block(*args: Any, skip_lam: float, **kwargs: Any) -> Block:
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
      for the class, as published. Fused tokens are left out of that, because the auxiliary head never learns
      what to say of them: they have no label. An image that has nothing but fused tokens left gets the class
      token's logits.
    * the class token's features [B, C] with ``num_classes=0``.

    In training mode it returns a :class:`TokenLabelOutput`, or, without the auxiliary head, logits
    [B, classes].

    The published code returns the auxiliary logits with MixToken's exchange undone, and the box it was in.
    Where patches are dropped it cannot be undone, since the other image may have dropped its own; so here
    they stay, and it is told where each came from.

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
            raise ValueError(f"LV-ViT's heads are for tokens: no global_pool={arguments['global_pool']!r}")
        if arguments.get("patch_drop_rate", 0) > 0:
            raise ValueError("patch_drop_rate would drop patches without telling which; LV-ViT labels each")
        # The published norms have PyTorch's eps, not that of timm's VisionTransformer.
        norm_layer = partial(LayerNorm, eps=1e-5)
        arguments = {"mlp_ratio": 3.0, "qkv_bias": False, "norm_layer": norm_layer, **arguments}
        super().__init__(
            embed_layer=partial(ConvStem, stem_dim=stem_dim),
            block_fn=partial(_scaled_block, skip_lam=skip_lam),  # type: ignore[arg-type]
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
        if global_pool not in (None, "token"):
            raise ValueError(f"LV-ViT's heads are for tokens: no global_pool={global_pool!r}")
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
        # Not len(x), which torch.export takes for a constant.
        patches = torch.arange(x.shape[1] - self.num_prefix_tokens, device=x.device).expand(x.shape[0], -1)
        for block in self.blocks:
            kept: Tensor | None
            if self.grad_checkpointing and torch.is_grad_enabled():
                x, kept = checkpoint(_run, block, x, use_reentrant=False)
            else:
                x, kept = _run(block, x)
            if kept is not None:
                patches = patches.gather(1, kept)
                if block.fuse_token:
                    patches = F.pad(patches, (0, 1), value=-1)
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
        return any(block.fuse_token and block.keep_rate < 1 for block in reorganizing_blocks(self))

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


def _run(block: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Run a block; also return which patch tokens it kept, int64 [B, K], or None where it kept all."""
    if not isinstance(block, ReorganizingBlock):
        return block(x), None
    kept: list[Tensor] = []
    x = block(x, kept=kept)
    return x, kept[0] if kept else None


def draw_exchanged(rows: int, columns: int, device: torch.device | None = None) -> Tensor:
    """Draw which patches MixToken exchanges: a box, drawn as the published code does, but by torch.

    With λ ~ Beta(1, 1), which is uniform, the box has the size of the grid times √(1 − λ), lies at a uniform
    place, and is cut off at the grid's edge.

    Args:
        rows: of the grid of patches.
        columns: of the grid.
        device: where to draw; nothing waits for it.

    Returns:
        bool [rows · columns].
    """
    side = (1 - torch.rand((), device=device)).sqrt()
    inside = []
    for length in (rows, columns):
        half = (side * length).long() // 2
        centre = torch.randint(length, (), device=device)
        place = torch.arange(length, device=device)
        inside.append((place >= centre - half) & (place < centre + half))
    return (inside[0].unsqueeze(1) & inside[1]).flatten()


def _filter_checkpoint(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Return the weights of a published LV-ViT checkpoint, without what it is wrapped in."""
    state_dict = state_dict.get("state_dict", state_dict)
    state = {key.removeprefix("module."): value for key, value in state_dict.items()}
    if getattr(model, "aux_head", None) is None:
        state = {key: value for key, value in state.items() if not key.startswith("aux_head.")}
    return state


def _create(
    size: str,
    pretrained: bool = False,
    keep_rate: float | Sequence[float] = 0.7,
    fuse_token: bool = True,
    drop_loc: Sequence[int] | None = None,
    **timm_kwargs: Any,
) -> LVViT:
    """Build the model behind `lvvit_<size>` and timm's registry name."""
    if timm_kwargs.get("features_only"):
        raise ValueError(
            "features_only needs a token for every patch, which a model that drops tokens does not have"
        )
    arguments = {"patch_size": 16, "dynamic_img_size": True, **_SIZES[size], **timm_kwargs}
    check_arguments(arguments["depth"], keep_rate, drop_loc, fuse_token)  # before anything is downloaded
    name = f"evit_lvvit_{size}_patch16_224"
    try:
        model = build_model_with_cfg(
            LVViT, name, pretrained, pretrained_filter_fn=_filter_checkpoint, **arguments
        )
    except Exception as error:
        if pretrained and is_connection_error(error):
            raise RuntimeError(
                f"the published weights of LV-ViT-{size.upper()} could not be fetched from GitHub, nor are "
                f"they in torch's cache ({type(error).__name__}). Without a network, use pretrained=False "
                "and load a file with evit_ext.load_checkpoint"
            ) from error
        raise
    return apply(model, keep_rate, drop_loc, fuse_token)


@register_model
def evit_lvvit_t_patch16_224(pretrained: bool = False, **kwargs: Any) -> LVViT:
    """EViT-LV-ViT-T: see :func:`lvvit_small`."""
    return _create("t", pretrained, **kwargs)


@register_model
def evit_lvvit_s_patch16_224(pretrained: bool = False, **kwargs: Any) -> LVViT:
    """EViT-LV-ViT-S: see :func:`lvvit_small`."""
    return _create("s", pretrained, **kwargs)


@register_model
def evit_lvvit_m_patch16_224(pretrained: bool = False, **kwargs: Any) -> LVViT:
    """EViT-LV-ViT-M: see :func:`lvvit_small`."""
    return _create("m", pretrained, **kwargs)


@register_model
def evit_lvvit_l_patch16_224(pretrained: bool = False, **kwargs: Any) -> LVViT:
    """EViT-LV-ViT-L: see :func:`lvvit_small`."""
    return _create("l", pretrained, **kwargs)


def lvvit_tiny(
    keep_rate: float | Sequence[float] = 0.7,
    fuse_token: bool = True,
    drop_loc: Sequence[int] | None = None,
    img_size: int | tuple[int, int] = 224,
    num_classes: int = 1000,
    pretrained: bool = False,
    **timm_kwargs: Any,
) -> LVViT:
    """Return EViT-LV-ViT-T: 240 channels, 4 heads, 12 blocks. Arguments as of :func:`lvvit_small`."""
    return _from_registry(
        "t", keep_rate, fuse_token, drop_loc, img_size, num_classes, pretrained, timm_kwargs
    )


def lvvit_small(
    keep_rate: float | Sequence[float] = 0.7,
    fuse_token: bool = True,
    drop_loc: Sequence[int] | None = None,
    img_size: int | tuple[int, int] = 224,
    num_classes: int = 1000,
    pretrained: bool = False,
    **timm_kwargs: Any,
) -> LVViT:
    """Return EViT-LV-ViT-S: 384 channels, 6 heads, 16 blocks, of which 4, 8 and 12 (from 0) reorganise.

    The same as ``timm.create_model("evit_lvvit_s_patch16_224", ...)``. At keep rate 1 it computes what the
    published LV-ViT computes, whose state-dict keys it has. It takes images [B, 3, height, width] of any size
    that is a multiple of the patch size, unless ``dynamic_img_size=False`` is given. In training mode it
    returns what a loss on token labels needs; see :class:`LVViT`.

    Args:
        keep_rate: share of the patch tokens that a reorganising block keeps, in (0, 1]; one number, or one
            for each reorganising block.
        fuse_token: fuse the patches that are not kept into one token; without it they are lost.
        drop_loc: numbers of the reorganising blocks, ascending, from 0; None for those at the quarters of
            the depth.
        img_size: size of the images, and so of the position embedding. Weights of another size can be
            loaded; their position embedding is resized as the published code does.
        num_classes: number of logits; 0 for a model that returns features.
        pretrained: load the published ImageNet-1k weights from GitHub (small and medium). They were trained
            without token reorganisation; at low keep rates the model needs fine-tuning.
        timm_kwargs: any other argument of ``timm.create_model`` and :class:`LVViT`, such as ``mix_token``,
            ``return_dense``, ``drop_path_rate``, ``in_chans``, ``depth``, ``checkpoint_path``.

    Raises:
        TypeError: an argument has a wrong type or is not known to timm.
        ValueError: an argument is out of range.
        RuntimeError: the pretrained weights could not be fetched, or there are none.
    """
    return _from_registry(
        "s", keep_rate, fuse_token, drop_loc, img_size, num_classes, pretrained, timm_kwargs
    )


def lvvit_medium(
    keep_rate: float | Sequence[float] = 0.7,
    fuse_token: bool = True,
    drop_loc: Sequence[int] | None = None,
    img_size: int | tuple[int, int] = 224,
    num_classes: int = 1000,
    pretrained: bool = False,
    **timm_kwargs: Any,
) -> LVViT:
    """Return EViT-LV-ViT-M: 512 channels, 8 heads, 20 blocks. Arguments as of :func:`lvvit_small`."""
    return _from_registry(
        "m", keep_rate, fuse_token, drop_loc, img_size, num_classes, pretrained, timm_kwargs
    )


def lvvit_large(
    keep_rate: float | Sequence[float] = 0.7,
    fuse_token: bool = True,
    drop_loc: Sequence[int] | None = None,
    img_size: int | tuple[int, int] = 224,
    num_classes: int = 1000,
    pretrained: bool = False,
    **timm_kwargs: Any,
) -> LVViT:
    """Return EViT-LV-ViT-L: 768 channels, 12 heads, 24 blocks, a stem of 128 channels instead of 64.

    Arguments as of :func:`lvvit_small`.
    """
    return _from_registry(
        "l", keep_rate, fuse_token, drop_loc, img_size, num_classes, pretrained, timm_kwargs
    )


def _from_registry(
    size: str,
    keep_rate: float | Sequence[float],
    fuse_token: bool,
    drop_loc: Sequence[int] | None,
    img_size: int | tuple[int, int],
    num_classes: int,
    pretrained: bool,
    timm_kwargs: dict[str, Any],
) -> LVViT:
    model = timm.create_model(
        f"evit_lvvit_{size}_patch16_224",
        pretrained=pretrained,
        keep_rate=keep_rate,
        fuse_token=fuse_token,
        drop_loc=drop_loc,
        img_size=img_size,
        num_classes=num_classes,
        **timm_kwargs,
    )
    assert isinstance(model, LVViT)
    return model
