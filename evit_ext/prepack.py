"""For inference on the CPU with weights that stay."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from evit_ext import packed_weights
from evit_ext.families import applied_blocks, find_blocks

Model = TypeVar("Model", bound=nn.Module)


def prepack(vit: Model, enabled: bool = True) -> Model:
    """Let the linear layers of an EViT's blocks keep their weights in oneDNN's layout; in place.

    For inference on the CPU, where every product otherwise begins with putting the weight into that layout.
    Results are the same. It takes as much memory again as the weights of the blocks. They are packed when
    first used, and again after they were changed: by an optimizer, ``load_state_dict``, ``model.to(...)`` or
    any operation on the parameter. A model that has gone to another device or dtype holds that memory, and
    its former weights, until it is used here again or lets go of them.

    Has no effect where the layers do not run through oneDNN: with gradients, under ``torch.compile``, at keep
    rate 1, in float16 and on other devices. A copy of the model, or one that is loaded, has to be prepacked
    anew.

    Warning:
        **What is written through ``parameter.data`` is not noticed**, as PyTorch does not count it as a
        change; nor is what comes through other tensors, NumPy arrays or processes that share the memory, or
        from the collectives of torch.distributed, such as ``broadcast(parameter)``. After such a change,
        let go of the packed weights: ``prepack(vit, False)``, and prepack the model anew.

    Args:
        vit: a model that :func:`evit_ext.apply` changed.
        enabled: False lets go of the packed weights.

    Returns:
        `vit`.

    Raises:
        ValueError: :func:`evit_ext.apply` has not changed the model.
    """
    applied_blocks(vit)
    blocks = find_blocks(getattr(vit, "_orig_mod", vit)) or nn.ModuleList()
    layers = [module for module in blocks.modules() if isinstance(module, nn.Linear)]
    (packed_weights.keep if enabled else packed_weights.let_go)(layers)
    return vit
