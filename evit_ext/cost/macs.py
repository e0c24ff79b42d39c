"""Counting the multiply-accumulates of a model."""

from __future__ import annotations

from typing import Any

import torch
from timm.utils.model import unwrap_model
from torch import nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode


def count_macs(model: nn.Module, img_size: int | tuple[int, int] | None = None) -> int:
    """Return the multiply-accumulates of one image's forward pass, as papers count them.

    Convolutions, linear layers and the two products of attention are counted. Biases, norms, activations and
    softmax are not; neither are EViT's own operators, whose work (a row of the attention map and a weighted
    sum of tokens) is below a thousandth of the total. For a model without a class token, the product that its
    scores need (see :func:`evit_ext.ops.mean_attention`) is counted, and so is that of ToMe's matching.
    Divide by 1e9 for GMACs: DeiT-S has 4.60, and 3.03 at keep rate 0.7.

    The model runs on meta tensors, in its current mode (a DynamicViT drops tokens in eval mode only): nothing
    is computed, no weight is copied or moved, and the model is not changed.

    Args:
        model: a timm model, or any module that takes images [B, channels, height, width]; on any device,
            compiled or not.
        img_size: height and width, or one number for both; default the size the model was built for.

    Returns:
        The number of multiply-accumulates.

    Raises:
        ValueError: `img_size` is needed, because the model does not say what size it was built for.
    """
    return run_counting(unwrap_model(model), img_size).get_total_flops() // 2


def run_counting(model: nn.Module, img_size: int | tuple[int, int] | None) -> FlopCounterMode:
    """Run `model` on an image of meta tensors, as :func:`count_macs` says; return what counted.

    Args:
        model: out of the wrappers of torch.compile and DistributedDataParallel.
        img_size: as for :func:`count_macs`.
    """
    channels, size = input_size(model, img_size)
    state: dict[str, Any] = {
        name: tensor.detach().to("meta")
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
    }
    dtype = next((tensor.dtype for tensor in state.values() if tensor.is_floating_point()), torch.float32)
    images = torch.empty(1, channels, *size, dtype=dtype, device="meta")
    # Scaled dot product attention has no fused kernel for meta tensors, so its two products are counted like
    # any others. Compiled parts run uncompiled under the counter, a dispatch mode.
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        functional_call(model, state, (images,))
    return counter


def input_size(model: nn.Module, img_size: int | tuple[int, int] | None) -> tuple[int, tuple[int, int]]:
    """Return the channels and (height, width) of the model's images, those that :func:`count_macs` takes."""
    patch_embed: Any = getattr(model, "patch_embed", None)
    config: Any = getattr(model, "pretrained_cfg", None) or {}
    configured = config.get("input_size") or (3, None, None)
    channels: Any = getattr(model, "in_chans", None)
    if channels is None:
        channels = getattr(getattr(patch_embed, "proj", None), "in_channels", configured[0])
    size: Any = img_size
    if size is None:
        size = getattr(patch_embed, "img_size", None) or configured[1:]
    height, width = (size, size) if isinstance(size, int) else size
    if height is None or width is None:
        raise ValueError(f"{type(model).__name__} does not tell the size of its images: give img_size")
    return int(channels), (int(height), int(width))
