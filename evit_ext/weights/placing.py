"""Weights into a model: all of them, or none and an error."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from evit_ext._util.messages import shortened


def check_plain(state: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless every tensor holds numbers of its own, an element each.

    What is on the meta device, sparse, quantised or a view that repeats what it has would fail in the middle
    of loading, or take more memory than its file.
    """
    wrong = [f"{shortened(key)} is {what}" for key, value in state.items() if (what := _what_else(value))]
    if wrong:
        more = f", and {len(wrong) - 1} more like it" if len(wrong) > 1 else ""
        raise ValueError(f"{wrong[0]}{more}: expected plain dense tensors")


def _what_else(value: Tensor) -> str:
    """Return what a tensor is that is not plain."""
    if type(value) not in (Tensor, nn.Parameter):
        return f"a {type(value).__name__}"
    if value.is_meta:
        return "on the meta device, which holds no numbers"
    if value.layout != torch.strided or value.is_nested:
        return f"in layout {value.layout}"
    if value.is_quantized:
        return f"quantised ({value.dtype})"
    stored = value.untyped_storage().nbytes() // value.element_size()
    if value.numel() > stored:
        return f"a view of {value.numel()} elements that repeats the {stored} that are stored"
    return ""


def place(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load weights that have the keys and shapes of the model's; whatever goes wrong, the model is as before.

    Args:
        model: without wrappers, with plain tensors.
        state: plain tensors on the CPU.

    Raises:
        ValueError: a tensor cannot be converted, two keys of one tensor have different weights, or what the
            model does itself when it loads weights has failed.
    """
    own = model.state_dict()
    ready = {}
    for key, value in state.items():
        try:
            ready[key] = value.to(own[key].dtype)
        except RuntimeError as error:
            raise ValueError(
                f"{key} cannot be converted from {value.dtype} to {own[key].dtype}: {shortened(error)}"
            ) from error
    _check_tied(own, ready)
    # On the CPU, as a GPU may not have the room. Modules may have hooks, and users an impatient Ctrl-C.
    before = {key: own[key].to("cpu", copy=True) for key in ready}
    try:
        model.load_state_dict(ready, strict=False)
    except BaseException as error:
        with torch.no_grad():
            for key, value in before.items():
                own[key].copy_(value)
        if not isinstance(error, Exception):
            raise
        raise ValueError(
            f"{type(model).__name__} refuses them ({type(error).__name__}: {shortened(error)}); its weights "
            "are as they were"
        ) from error


def _check_tied(own: Mapping[str, Tensor], ready: Mapping[str, Tensor]) -> None:
    """Raise ValueError where keys of one tensor would get different weights, of which the last would stay."""
    first: dict[object, str] = {}
    for key, value in ready.items():
        ours = own[key]
        if not ours.numel():
            continue
        other = first.setdefault((ours.device, ours.data_ptr(), ours.shape, ours.stride()), key)
        if other != key and not torch.equal(ready[other], value):
            raise ValueError(f"{other} and {key} are one tensor of the model, but differ in the file")
