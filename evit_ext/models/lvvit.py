"""EViT-LV-ViT by name: the tiny, small, medium and large models, and their names in timm's registry.

LV-ViT is by Jiang et al., "All Tokens Matter: Token Labeling for Training Better Vision Transformers"
(NeurIPS 2021, arXiv 2104.10858). Sizes and weights are those of its published code
(github.com/zihangJiang/TokenLabeling).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from evit_ext.models.building import explaining_missing_network, feature_settings, reorganizing
from evit_ext.models.lvvit_model import LVViT, ResidualScale, TokenLabelOutput
from evit_ext.models.lvvit_stem import ConvStem
from evit_ext.models.mix_token import draw_exchanged
from evit_ext.models.named import named_model
from evit_ext.patching.applying import check_locations, check_rules
from evit_ext.tokens.evit import EViT

#: The rule that these models are built with.
RULE = EViT.name

__all__ = [
    "ConvStem",
    "LVViT",
    "ResidualScale",
    "TokenLabelOutput",
    "draw_exchanged",
    "lvvit_large",
    "lvvit_medium",
    "lvvit_small",
    "lvvit_tiny",
]

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
) -> nn.Module:
    """Build the model behind `lvvit_<size>` and timm's registry name."""
    arguments = {"patch_size": 16, "dynamic_img_size": True, **_SIZES[size], **timm_kwargs}
    # Before anything is downloaded.
    check_rules(len(check_locations(arguments["depth"], drop_loc)), keep_rate, fuse_token)
    what = (
        f"the published weights of LV-ViT-{size.upper()} could not be fetched from GitHub, nor are they in "
        "torch's cache"
    )
    with explaining_missing_network(pretrained, what):
        return build_model_with_cfg(
            reorganizing(LVViT, keep_rate, drop_loc, fuse_token),
            f"evit_lvvit_{size}_patch16_224",
            pretrained,
            pretrained_filter_fn=_filter_checkpoint,
            feature_cfg=feature_settings(arguments),
            **arguments,
        )


@register_model
def evit_lvvit_t_patch16_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """EViT-LV-ViT-T: see :func:`lvvit_small`."""
    return _create("t", pretrained, **kwargs)


@register_model
def evit_lvvit_s_patch16_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """EViT-LV-ViT-S: see :func:`lvvit_small`."""
    return _create("s", pretrained, **kwargs)


@register_model
def evit_lvvit_m_patch16_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """EViT-LV-ViT-M: see :func:`lvvit_small`."""
    return _create("m", pretrained, **kwargs)


@register_model
def evit_lvvit_l_patch16_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """EViT-LV-ViT-L: see :func:`lvvit_small`."""
    return _create("l", pretrained, **kwargs)


@named_model("evit_lvvit_t_patch16_224", LVViT, drop_loc=None)
def lvvit_tiny() -> None:
    """Return EViT-LV-ViT-T: 240 channels, 4 heads, 12 blocks. Same arguments as :func:`lvvit_small`."""


@named_model("evit_lvvit_s_patch16_224", LVViT, drop_loc=None)
def lvvit_small() -> None:
    """Return EViT-LV-ViT-S: 384 channels, 6 heads, 16 blocks, of which 4, 8 and 12 (from 0) reorganise.

    The same as ``timm.create_model("evit_lvvit_s_patch16_224", ...)``. At keep rate 1 it computes what the
    published LV-ViT computes, whose state-dict keys it has. It takes images [B, 3, height, width] of any size
    that is a multiple of the patch size, unless ``dynamic_img_size=False`` is given. In training mode it
    returns what a loss on token labels needs; see :class:`LVViT`.

    Args:
        keep_rate: share of the patch tokens that a reorganising block keeps, in (0, 1]; one number, or one
            for each reorganising block.
        fuse_token: fuse the patches that are not kept into one token; False discards them.
        drop_loc: numbers of the reorganising blocks, ascending, from 0; None for those at the quarters of
            the depth.
        img_size: size of the images, and so of the position embedding. Weights of another size can be
            loaded; their position embedding is resized as the published code does.
        num_classes: number of logits; 0 for a model that returns features.
        pretrained: load the published ImageNet-1k weights from GitHub (small and medium). They were trained
            without token reorganisation; at low keep rates the model needs fine-tuning.
        timm_kwargs: any other argument of ``timm.create_model`` and :class:`LVViT`, such as ``mix_token``,
            ``return_dense``, ``drop_path_rate``, ``in_chans``, ``depth``, ``checkpoint_path``. With
            ``features_only=True``, timm's FeatureGetterNet around the model is returned, as
            :func:`evit_ext.models.deit_small` does; MixToken is not in it.

    Raises:
        TypeError: an argument has a wrong type or is not known to timm.
        ValueError: an argument is out of range.
        RuntimeError: the pretrained weights could not be fetched, or there are none.
    """


@named_model("evit_lvvit_m_patch16_224", LVViT, drop_loc=None)
def lvvit_medium() -> None:
    """Return EViT-LV-ViT-M: 512 channels, 8 heads, 20 blocks. Same arguments as :func:`lvvit_small`."""


@named_model("evit_lvvit_l_patch16_224", LVViT, drop_loc=None)
def lvvit_large() -> None:
    """Return EViT-LV-ViT-L: 768 channels, 12 heads, 24 blocks, a stem of 128 channels instead of 64.

    Same arguments as :func:`lvvit_small`.
    """
