"""DeiT with token reorganisation: the tiny, small and base models of the EViT paper."""

from __future__ import annotations

import errno
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import timm
from timm.models import (
    PretrainedCfg,
    build_model_with_cfg,
    generate_default_cfgs,
    get_pretrained_cfg,
    register_model,
)
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor

from evit_ext.apply import apply, check_arguments
from evit_ext.models.deit_model import DeiT

__all__ = [
    "DeiT",
    "build_deit",
    "deit_arguments",
    "deit_base",
    "deit_pretrained_cfg",
    "deit_small",
    "deit_tiny",
    "is_connection_error",
]

Model = TypeVar("Model", bound="DeiT")

_SIZES = {
    "tiny": {"embed_dim": 192, "num_heads": 3},
    "small": {"embed_dim": 384, "num_heads": 6},
    "base": {"embed_dim": 768, "num_heads": 12},
}


def deit_pretrained_cfg(size: str) -> PretrainedCfg:
    """Return timm's configuration of DeiT's own weights of a size."""
    cfg = get_pretrained_cfg(f"deit_{size}_patch16_224.fb_in1k")
    assert cfg is not None
    return cfg


# The published EViTs start from DeiT's weights, which timm keeps under DeiT's names.
default_cfgs = generate_default_cfgs(
    {f"evit_deit_{size}_patch16_224.fb_in1k": deit_pretrained_cfg(size) for size in _SIZES}
)


def _filter_checkpoint(state_dict: Mapping[str, Any], model: DeiT) -> dict[str, Tensor]:
    """Return the weights of a DeiT checkpoint under timm's keys, the position embedding at its own size.

    Parts that `model` adds to a DeiT (``ADDED``) keep the weights they have where the checkpoint has none.
    """
    for nesting in ("model", "state_dict"):
        state_dict = state_dict.get(nesting, state_dict)
    state = dict(state_dict)
    # timm would resize it its own way; loading it into a DeiT resizes it the published way.
    embedding = state.pop("pos_embed", None)
    state = checkpoint_filter_fn(state, model)
    if embedding is not None:
        state["pos_embed"] = embedding
    added = getattr(model, "ADDED", ())
    own = {key: value for key, value in model.state_dict().items() if key.startswith(added)} if added else {}
    return {**own, **state}


def build_deit(
    cls: type[Model], name: str, size: str, pretrained: bool, arguments: Mapping[str, Any]
) -> Model:
    """Build a `cls` of one of DeiT's sizes, with DeiT's weights if `pretrained`.

    Args:
        cls: :class:`DeiT` or a subclass.
        name: its name in timm's registry, without a tag.
        size: "tiny", "small" or "base".
        pretrained: load the weights that `name` has in timm's registry.
        arguments: of `cls` and of timm's ``build_model_with_cfg``.

    Raises:
        TypeError, ValueError: an argument is wrong or not known.
        RuntimeError: the pretrained weights could not be fetched.
    """
    try:
        return build_model_with_cfg(
            cls, name, pretrained, pretrained_filter_fn=_filter_checkpoint, **deit_arguments(size, arguments)
        )
    except Exception as error:
        if pretrained and is_connection_error(error):
            raise RuntimeError(
                f"the pretrained weights of deit_{size}_patch16_224 could not be fetched from the Hugging "
                f"Face hub, nor are they in its cache ({type(error).__name__}). Without a network, use "
                "pretrained=False and load a file with evit_ext.load_checkpoint"
            ) from error
        raise


def deit_arguments(size: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a DeiT of `size` is built with, where `arguments` do not say otherwise.

    Raises:
        ValueError: `arguments` ask for ``features_only``.
    """
    if arguments.get("features_only"):
        raise ValueError(
            "features_only needs a token for every patch, which a model that drops tokens does not have"
        )
    return {"patch_size": 16, "depth": 12, "dynamic_img_size": True, **_SIZES[size], **arguments}


def _create(
    size: str,
    pretrained: bool = False,
    keep_rate: float | Sequence[float] = 0.7,
    fuse_token: bool = True,
    drop_loc: Sequence[int] | None = None,
    **timm_kwargs: Any,
) -> DeiT:
    """Build the model behind `deit_<size>` and timm's registry name."""
    arguments = deit_arguments(size, timm_kwargs)
    check_arguments(arguments["depth"], keep_rate, drop_loc, fuse_token)  # before anything is downloaded
    model = build_deit(DeiT, f"evit_deit_{size}_patch16_224", size, pretrained, arguments)
    return apply(model, keep_rate, drop_loc, fuse_token)


def is_connection_error(error: Exception) -> bool:
    """Return whether `error` says that a network, or what is behind it, could not be reached."""
    # The hub's client has changed its HTTP library, and with it the class of its errors, more than once.
    libraries = ("huggingface_hub", "httpx", "httpcore", "requests", "urllib")
    if type(error).__module__.startswith(libraries):
        return True
    # What the operating system says about the network; what it says about files is passed on as it is.
    about_files = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
    is_full = isinstance(error, OSError) and error.errno == errno.ENOSPC
    return isinstance(error, OSError) and not isinstance(error, about_files) and not is_full


@register_model
def evit_deit_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> DeiT:
    """EViT-DeiT-T: see :func:`deit_tiny`."""
    return _create("tiny", pretrained, **kwargs)


@register_model
def evit_deit_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> DeiT:
    """EViT-DeiT-S: see :func:`deit_small`."""
    return _create("small", pretrained, **kwargs)


@register_model
def evit_deit_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> DeiT:
    """EViT-DeiT-B: see :func:`deit_base`."""
    return _create("base", pretrained, **kwargs)


def deit_tiny(
    keep_rate: float | Sequence[float] = 0.7,
    fuse_token: bool = True,
    drop_loc: Sequence[int] | None = (3, 6, 9),
    img_size: int | tuple[int, int] = 224,
    num_classes: int = 1000,
    pretrained: bool = False,
    **timm_kwargs: Any,
) -> DeiT:
    """Return EViT-DeiT-T: 192 channels, 3 heads, 12 blocks. Arguments as of :func:`deit_small`."""
    return _from_registry(
        "tiny", keep_rate, fuse_token, drop_loc, img_size, num_classes, pretrained, timm_kwargs
    )


def deit_small(
    keep_rate: float | Sequence[float] = 0.7,
    fuse_token: bool = True,
    drop_loc: Sequence[int] | None = (3, 6, 9),
    img_size: int | tuple[int, int] = 224,
    num_classes: int = 1000,
    pretrained: bool = False,
    **timm_kwargs: Any,
) -> DeiT:
    """Return EViT-DeiT-S: 384 channels, 6 heads, 12 blocks.

    The same as ``timm.create_model("evit_deit_small_patch16_224", ...)`` and, at keep rate 1, as timm's
    ``deit_small_patch16_224``, whose state-dict keys it has. It takes images [B, 3, height, width] of any
    size that is a multiple of the patch size, unless ``dynamic_img_size=False`` is given.

    Args:
        keep_rate: share of the patch tokens that a reorganising block keeps, in (0, 1]; one number, or one
            for each reorganising block.
        fuse_token: fuse the patches that are not kept into one token; without it they are lost.
        drop_loc: numbers of the reorganising blocks, ascending, from 0; None for those at the quarters of
            the depth.
        img_size: size of the images, and so of the position embedding. Weights of another size can be
            loaded; their position embedding is resized as the published code does.
        num_classes: number of logits; 0 for a model that returns features.
        pretrained: load DeiT's ImageNet-1k weights through timm's hub. They were trained without token
            reorganisation; at low keep rates the model needs fine-tuning.
        timm_kwargs: any other argument of ``timm.create_model`` and timm's VisionTransformer, such as
            ``in_chans``, ``drop_path_rate``, ``depth``, ``checkpoint_path``.

    Raises:
        TypeError: an argument has a wrong type or is not known to timm.
        ValueError: an argument is out of range.
        RuntimeError: the pretrained weights could not be fetched.
    """
    return _from_registry(
        "small", keep_rate, fuse_token, drop_loc, img_size, num_classes, pretrained, timm_kwargs
    )


def deit_base(
    keep_rate: float | Sequence[float] = 0.7,
    fuse_token: bool = True,
    drop_loc: Sequence[int] | None = (3, 6, 9),
    img_size: int | tuple[int, int] = 224,
    num_classes: int = 1000,
    pretrained: bool = False,
    **timm_kwargs: Any,
) -> DeiT:
    """Return EViT-DeiT-B: 768 channels, 12 heads, 12 blocks. Arguments as of :func:`deit_small`."""
    return _from_registry(
        "base", keep_rate, fuse_token, drop_loc, img_size, num_classes, pretrained, timm_kwargs
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
) -> DeiT:
    model = timm.create_model(
        f"evit_deit_{size}_patch16_224",
        pretrained=pretrained,
        keep_rate=keep_rate,
        fuse_token=fuse_token,
        drop_loc=drop_loc,
        img_size=img_size,
        num_classes=num_classes,
        **timm_kwargs,
    )
    assert isinstance(model, DeiT)
    return model
