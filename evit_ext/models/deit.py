"""EViT-DeiT by name: the paper's tiny, small and base models, distilled too, and those for larger images.

Each is a function, and a name in timm's registry.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from timm.models import (
    PretrainedCfg,
    build_model_with_cfg,
    generate_default_cfgs,
    get_pretrained_cfg,
    register_model,
)
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor, nn

from evit_ext.models.building import explaining_missing_network, feature_settings, reorganizing
from evit_ext.models.deit_model import DeiT, DistilledDeiT
from evit_ext.models.named import named_model
from evit_ext.patching.applying import check_locations, check_rules
from evit_ext.tokens.evit import EViT

#: The rule that these models are built with.
RULE = EViT.name

__all__ = [
    "DeiT",
    "DistilledDeiT",
    "build_deit",
    "deit_arguments",
    "deit_base",
    "deit_base_distilled",
    "deit_pretrained_cfg",
    "deit_small",
    "deit_small_256",
    "deit_small_272",
    "deit_small_288",
    "deit_small_304",
    "deit_small_distilled",
    "deit_tiny",
    "deit_tiny_distilled",
]

Model = TypeVar("Model", bound=DeiT)

_SIZES = {
    "tiny": {"embed_dim": 192, "num_heads": 3},
    "small": {"embed_dim": 384, "num_heads": 6},
    "base": {"embed_dim": 768, "num_heads": 12},
}

#: Keep rates at which images of a size cost what DeiT-S costs at 224, as published (Liang et al., 2022).
_KEEP_RATES = {256: 0.8, 272: 0.7, 288: 0.6, 304: 0.5}


def deit_pretrained_cfg(size: str, img_size: int = 224) -> PretrainedCfg:
    """Return timm's configuration of DeiT's own weights, for a model that takes images of `img_size`.

    Args:
        size: "tiny", "small" or "base", with "_distilled" or not.
        img_size: the weights are for 224.
    """
    cfg = get_pretrained_cfg(f"deit_{size}_patch16_224.fb_in1k")
    assert cfg is not None
    return cfg if img_size == 224 else replace(cfg, input_size=(3, img_size, img_size))


# The published EViTs start from DeiT's weights, which timm keeps under DeiT's names.
default_cfgs = generate_default_cfgs(
    {
        **{f"evit_deit_{size}_patch16_224.fb_in1k": deit_pretrained_cfg(size) for size in _SIZES},
        **{
            f"evit_deit_{size}_distilled_patch16_224.fb_in1k": deit_pretrained_cfg(f"{size}_distilled")
            for size in _SIZES
        },
        **{
            f"evit_deit_small_patch16_{img_size}.fb_in1k": deit_pretrained_cfg("small", img_size)
            for img_size in _KEEP_RATES
        },
    }
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
    model_class: Callable[..., Model], name: str, weights: str, pretrained: bool, arguments: Mapping[str, Any]
) -> Model:
    """Build a DeiT, with DeiT's weights if `pretrained`.

    Args:
        model_class: what builds it: :class:`DeiT`, a subclass, or a function that returns one.
        name: its name in timm's registry, without a tag.
        weights: what the pretrained weights are called, for the message where they cannot be fetched.
        pretrained: load the weights that `name` has in timm's registry.
        arguments: of `model_class` and of timm's ``build_model_with_cfg``.

    Returns:
        The model; timm's FeatureGetterNet around it where `arguments` ask for ``features_only``.

    Raises:
        TypeError, ValueError: an argument is wrong or not known.
        RuntimeError: the pretrained weights could not be fetched.
    """
    what = (
        f"the pretrained weights of {weights} could not be fetched from the Hugging Face hub, nor are they "
        "in its cache"
    )
    with explaining_missing_network(pretrained, what):
        return build_model_with_cfg(
            model_class,
            name,
            pretrained,
            pretrained_filter_fn=_filter_checkpoint,
            feature_cfg=feature_settings(arguments),
            **arguments,
        )


def deit_arguments(size: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a DeiT of `size` is built with, where `arguments` do not say otherwise."""
    return {"patch_size": 16, "depth": 12, "dynamic_img_size": True, **_SIZES[size], **arguments}


def _create(
    model_class: type[DeiT],
    name: str,
    size: str,
    pretrained: bool = False,
    keep_rate: float | Sequence[float] = 0.7,
    fuse_token: bool = True,
    drop_loc: Sequence[int] | None = None,
    **timm_kwargs: Any,
) -> nn.Module:
    """Build the model behind `name` in timm's registry."""
    arguments = deit_arguments(size, timm_kwargs)
    # Before anything is downloaded.
    check_rules(len(check_locations(arguments["depth"], drop_loc)), keep_rate, fuse_token)
    build = reorganizing(model_class, keep_rate, drop_loc, fuse_token)
    weights = f"deit_{size}{'_distilled' if model_class is DistilledDeiT else ''}_patch16_224"
    return build_deit(build, name, weights, pretrained, arguments)


@register_model
def evit_deit_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """EViT-DeiT-T: see :func:`deit_tiny`."""
    return _create(DeiT, "evit_deit_tiny_patch16_224", "tiny", pretrained, **kwargs)


@register_model
def evit_deit_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """EViT-DeiT-S: see :func:`deit_small`."""
    return _create(DeiT, "evit_deit_small_patch16_224", "small", pretrained, **kwargs)


@register_model
def evit_deit_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """EViT-DeiT-B: see :func:`deit_base`."""
    return _create(DeiT, "evit_deit_base_patch16_224", "base", pretrained, **kwargs)


@register_model
def evit_deit_tiny_distilled_patch16_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """EViT-DeiT-T with a distillation token: see :func:`deit_tiny_distilled`."""
    return _create(DistilledDeiT, "evit_deit_tiny_distilled_patch16_224", "tiny", pretrained, **kwargs)


@register_model
def evit_deit_small_distilled_patch16_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """EViT-DeiT-S with a distillation token: see :func:`deit_small_distilled`."""
    return _create(DistilledDeiT, "evit_deit_small_distilled_patch16_224", "small", pretrained, **kwargs)


@register_model
def evit_deit_base_distilled_patch16_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """EViT-DeiT-B with a distillation token: see :func:`deit_base_distilled`."""
    return _create(DistilledDeiT, "evit_deit_base_distilled_patch16_224", "base", pretrained, **kwargs)


def _at_equal_cost(img_size: int, pretrained: bool, arguments: dict[str, Any]) -> nn.Module:
    arguments = {"keep_rate": _KEEP_RATES[img_size], **arguments}
    return _create(DeiT, f"evit_deit_small_patch16_{img_size}", "small", pretrained, **arguments)


@register_model
def evit_deit_small_patch16_256(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """EViT-DeiT-S for images of 256, keep rate 0.8: see :func:`deit_small_256`."""
    return _at_equal_cost(256, pretrained, kwargs)


@register_model
def evit_deit_small_patch16_272(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """EViT-DeiT-S for images of 272, keep rate 0.7: see :func:`deit_small_272`."""
    return _at_equal_cost(272, pretrained, kwargs)


@register_model
def evit_deit_small_patch16_288(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """EViT-DeiT-S for images of 288, keep rate 0.6: see :func:`deit_small_288`."""
    return _at_equal_cost(288, pretrained, kwargs)


@register_model
def evit_deit_small_patch16_304(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """EViT-DeiT-S for images of 304, keep rate 0.5: see :func:`deit_small_304`."""
    return _at_equal_cost(304, pretrained, kwargs)


@named_model("evit_deit_tiny_patch16_224", DeiT)
def deit_tiny() -> None:
    """Return EViT-DeiT-T: 192 channels, 3 heads, 12 blocks. Same arguments as :func:`deit_small`."""


@named_model("evit_deit_small_patch16_224", DeiT)
def deit_small() -> None:
    """Return EViT-DeiT-S: 384 channels, 6 heads, 12 blocks.

    The same as ``timm.create_model("evit_deit_small_patch16_224", ...)`` and, at keep rate 1, as timm's
    ``deit_small_patch16_224``, whose state-dict keys it has. It takes images [B, 3, height, width] of any
    size that is a multiple of the patch size, unless ``dynamic_img_size=False`` is given.

    Args:
        keep_rate: share of the patch tokens that a reorganising block keeps, in (0, 1]; one number, or one
            for each reorganising block.
        fuse_token: fuse the patches that are not kept into one token; False discards them.
        drop_loc: numbers of the reorganising blocks, ascending, from 0; None for those at the quarters of
            the depth.
        img_size: size of the images, and so of the position embedding. Weights of another size can be
            loaded; their position embedding is resized as the published code does.
        num_classes: number of logits; 0 for a model that returns features.
        pretrained: load DeiT's ImageNet-1k weights through timm's hub. They were trained without token
            reorganisation; at low keep rates the model needs fine-tuning.
        timm_kwargs: any other argument of ``timm.create_model`` and timm's VisionTransformer, such as
            ``in_chans``, ``drop_path_rate``, ``depth``, ``checkpoint_path``. With ``features_only=True`` and
            ``out_indices``, the numbers of blocks, timm's FeatureGetterNet around the model is returned: it
            gives a list of features of all patches, [B, 384, height / 16, width / 16] each, as
            ``forward_intermediates`` of any model that :func:`evit_ext.apply` changed.

    Raises:
        TypeError: an argument has a wrong type or is not known to timm.
        ValueError: an argument is out of range.
        RuntimeError: the pretrained weights could not be fetched.
    """


@named_model("evit_deit_base_patch16_224", DeiT)
def deit_base() -> None:
    """Return EViT-DeiT-B: 768 channels, 12 heads, 12 blocks. Same arguments as :func:`deit_small`."""


@named_model("evit_deit_small_patch16_256", DeiT, keep_rate=_KEEP_RATES[256], img_size=256)
def deit_small_256() -> None:
    """Return EViT-DeiT-S for images of 256 × 256 at keep rate 0.8: 4.61 GMACs, DeiT-S has 4.60 at 224.

    One of the four settings of the paper that spend what is saved on larger images. Same arguments as
    :func:`deit_small`; ``pretrained`` loads its weights, for 224, with the position embedding resized.
    """


@named_model("evit_deit_small_patch16_272", DeiT, keep_rate=_KEEP_RATES[272], img_size=272)
def deit_small_272() -> None:
    """Return EViT-DeiT-S for images of 272 × 272 at keep rate 0.7: 4.56 GMACs. See :func:`deit_small_256`."""


@named_model("evit_deit_small_patch16_288", DeiT, keep_rate=_KEEP_RATES[288], img_size=288)
def deit_small_288() -> None:
    """Return EViT-DeiT-S for images of 288 × 288 at keep rate 0.6: 4.50 GMACs. See :func:`deit_small_256`."""


@named_model("evit_deit_small_patch16_304", DeiT, keep_rate=_KEEP_RATES[304], img_size=304)
def deit_small_304() -> None:
    """Return EViT-DeiT-S for images of 304 × 304 at keep rate 0.5: 4.44 GMACs. See :func:`deit_small_256`."""


@named_model("evit_deit_tiny_distilled_patch16_224", DistilledDeiT)
def deit_tiny_distilled() -> None:
    """Return :func:`deit_tiny` with a distillation token. See :func:`deit_small_distilled`."""


@named_model("evit_deit_small_distilled_patch16_224", DistilledDeiT)
def deit_small_distilled() -> None:
    """Return :func:`deit_small` with a distillation token (Touvron et al., ICML 2021, arXiv 2012.12877).

    The distillation token is never dropped. The model returns the mean of two heads' logits [B, classes], or
    both in training after ``model.set_distilled_training(True)``; see :class:`DistilledDeiT`. Same
    arguments as :func:`deit_small`; ``pretrained`` loads timm's ``deit_small_distilled_patch16_224.fb_in1k``.
    """


@named_model("evit_deit_base_distilled_patch16_224", DistilledDeiT)
def deit_base_distilled() -> None:
    """Return :func:`deit_base` with a distillation token. See :func:`deit_small_distilled`."""
