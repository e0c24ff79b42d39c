"""DynamicViT by name: the tiny, small and base models, and their names in timm's registry.

The model that EViT is compared with, by Rao et al., "DynamicViT: Efficient Vision Transformers with Dynamic
Token Sparsification" (NeurIPS 2021, arXiv 2106.02034).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import timm
from timm.models import generate_default_cfgs, register_model

from evit_ext.models.deit import build_deit, deit_arguments, deit_pretrained_cfg
from evit_ext.models.dynamicvit_model import DynamicViT, DynamicViTOutput
from evit_ext.patching.applying import check_locations
from evit_ext.tokens.dynamicvit import (
    PredictedSelection,
    TokenPredictor,
    gumbel_noise,
    sample_decisions,
)
from evit_ext.tokens.keep_rate import check_keep_rates

#: The rule that these models are built with.
RULE = PredictedSelection.name

__all__ = [
    "DynamicViT",
    "DynamicViTOutput",
    "TokenPredictor",
    "dynamicvit_base",
    "dynamicvit_small",
    "dynamicvit_tiny",
    "gumbel_noise",
    "sample_decisions",
]

# The published DynamicViTs start from DeiT's weights, which timm keeps under DeiT's names.
default_cfgs = generate_default_cfgs(
    {
        f"dynamicvit_deit_{size}_patch16_224.fb_in1k": deit_pretrained_cfg(size)
        for size in ("tiny", "small", "base")
    }
)


def _create(
    size: str,
    pretrained: bool = False,
    keep_rate: float | Sequence[float] = 0.7,
    drop_loc: Sequence[int] | None = None,
    **timm_kwargs: Any,
) -> DynamicViT:
    """Build the model behind `dynamicvit_<size>` and timm's registry name."""
    if timm_kwargs.get("features_only"):
        raise ValueError(
            "features_only needs a token for every patch, which a DynamicViT does not have: it drops patches "
            "for good, and an EViT (evit_ext.models.deit_small) does not"
        )
    arguments = deit_arguments(size, timm_kwargs)
    # Before anything is downloaded.
    check_keep_rates(keep_rate, len(check_locations(arguments["depth"], drop_loc)))
    arguments = {"keep_rate": keep_rate, "drop_loc": drop_loc, **arguments}
    name, weights = f"dynamicvit_deit_{size}_patch16_224", f"deit_{size}_patch16_224"
    return build_deit(DynamicViT, name, weights, pretrained, arguments)


@register_model
def dynamicvit_deit_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> DynamicViT:
    """DynamicViT-DeiT-T: see :func:`dynamicvit_tiny`."""
    return _create("tiny", pretrained, **kwargs)


@register_model
def dynamicvit_deit_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> DynamicViT:
    """DynamicViT-DeiT-S: see :func:`dynamicvit_small`."""
    return _create("small", pretrained, **kwargs)


@register_model
def dynamicvit_deit_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> DynamicViT:
    """DynamicViT-DeiT-B: see :func:`dynamicvit_base`."""
    return _create("base", pretrained, **kwargs)


def dynamicvit_tiny(
    keep_rate: float | Sequence[float] = 0.7,
    drop_loc: Sequence[int] | None = (3, 6, 9),
    img_size: int | tuple[int, int] = 224,
    num_classes: int = 1000,
    pretrained: bool = False,
    **timm_kwargs: Any,
) -> DynamicViT:
    """Return DynamicViT-DeiT-T: 192 channels, 3 heads. Same arguments as :func:`dynamicvit_small`."""
    return _from_registry("tiny", keep_rate, drop_loc, img_size, num_classes, pretrained, timm_kwargs)


def dynamicvit_small(
    keep_rate: float | Sequence[float] = 0.7,
    drop_loc: Sequence[int] | None = (3, 6, 9),
    img_size: int | tuple[int, int] = 224,
    num_classes: int = 1000,
    pretrained: bool = False,
    **timm_kwargs: Any,
) -> DynamicViT:
    """Return DynamicViT-DeiT-S: 384 channels, 6 heads, 12 blocks.

    The same as ``timm.create_model("dynamicvit_deit_small_patch16_224", ...)``. It takes images [B, 3,
    height, width] of any size that is a multiple of the patch size, unless ``dynamic_img_size=False`` is
    given. Published checkpoints load with ``checkpoint_path=`` or ``evit_ext.load_checkpoint``.

    Args:
        keep_rate: share of the patches that a stage keeps of those that enter it, in (0, 1]; one number, or
            one for each stage.
        drop_loc: numbers of the blocks before which patches are dropped, ascending, from 0; None for those
            at the quarters of the depth.
        img_size: size of the images, and so of the position embedding.
        num_classes: number of logits; 0 for a model that returns features.
        pretrained: load DeiT's ImageNet-1k weights through timm's hub, from which the published models were
            trained. The predictors stay untrained.
        timm_kwargs: any other argument of ``timm.create_model`` and timm's VisionTransformer.

    Raises:
        TypeError: an argument has a wrong type or is not known to timm.
        ValueError: an argument is out of range.
        RuntimeError: the pretrained weights could not be fetched.
    """
    return _from_registry("small", keep_rate, drop_loc, img_size, num_classes, pretrained, timm_kwargs)


def dynamicvit_base(
    keep_rate: float | Sequence[float] = 0.7,
    drop_loc: Sequence[int] | None = (3, 6, 9),
    img_size: int | tuple[int, int] = 224,
    num_classes: int = 1000,
    pretrained: bool = False,
    **timm_kwargs: Any,
) -> DynamicViT:
    """Return DynamicViT-DeiT-B: 768 channels, 12 heads. Same arguments as :func:`dynamicvit_small`."""
    return _from_registry("base", keep_rate, drop_loc, img_size, num_classes, pretrained, timm_kwargs)


def _from_registry(
    size: str,
    keep_rate: float | Sequence[float],
    drop_loc: Sequence[int] | None,
    img_size: int | tuple[int, int],
    num_classes: int,
    pretrained: bool,
    timm_kwargs: dict[str, Any],
) -> DynamicViT:
    model = timm.create_model(
        f"dynamicvit_deit_{size}_patch16_224",
        pretrained=pretrained,
        keep_rate=keep_rate,
        drop_loc=drop_loc,
        img_size=img_size,
        num_classes=num_classes,
        **timm_kwargs,
    )
    assert isinstance(model, DynamicViT)
    return model
