"""Faster inference on the CPU for a model whose weights no longer change."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from evit_ext.cpu import packed_weights
from evit_ext.cpu.patch_projection import patch_projections
from evit_ext.patching.block import AdoptedBlock
from evit_ext.patching.families import locate
from evit_ext.tokens.stage import stages_of

Model = TypeVar("Model", bound=nn.Module)


def prepack(vit: Model, enabled: bool = True) -> Model:
    """Let an EViT's blocks and patch projection keep their weights in oneDNN's layout; in place.

    This speeds up inference on the CPU, where every product otherwise begins by converting the weight to that
    layout. Results are the same. These weights take twice the memory. They are packed when first used,
    and again after a change by an optimizer, ``load_state_dict``, ``model.to(...)`` or any operation on the
    parameter. A model that was moved to another device or dtype holds the packed weights until it runs here
    again or ``prepack(vit, False)`` is called.

    It has no effect where layers do not run through oneDNN: with gradients, under ``torch.compile``, at keep
    rate 1, in float16 and on other devices; nor, with a warning, on weights that were made (or converted) in
    ``torch.inference_mode()``, whose changes PyTorch does not count. A copy of the model, or a model loaded
    from a file, must be prepacked again.

    Warning:
        **Changes through ``parameter.data`` go unnoticed**, because PyTorch does not count them. So do
        changes through other tensors, NumPy arrays or processes that share the memory, and through
        collectives of torch.distributed, such as ``broadcast(parameter)``. After such a change, call
        ``prepack(vit, False)`` and then ``prepack(vit)``.

    Args:
        vit: a model that :func:`evit_ext.apply` changed.
        enabled: False frees the packed weights.

    Returns:
        `vit`.

    Raises:
        ValueError: :func:`evit_ext.apply` has not changed the model.
    """
    stages, located = stages_of(vit), locate(vit)
    if located is None or not any(isinstance(stage, AdoptedBlock) for stage in stages):
        raise ValueError(
            f"{type(vit).__name__} has no block that evit_ext.apply replaced: its layers do not run through "
            "oneDNN, so there is nothing to pack"
        )
    linear = [module for module in located.blocks.modules() if isinstance(module, nn.Linear)]
    layers = [*linear, *patch_projections(located.vit)]
    (packed_weights.keep if enabled else packed_weights.discard)(layers)
    return vit
