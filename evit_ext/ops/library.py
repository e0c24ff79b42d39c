"""Shared by the operator modules: access to the compiled library, and when its kernels can run."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from evit_ext._util.compiled import build_info  # importing it registers torch.ops.evit
from evit_ext._util.messages import shown
from evit_ext.ops import checks

#: Device types that have compiled kernels. Meta tensors go through the operators' shape inference.
KERNEL_DEVICES = frozenset({"cpu", "meta"} | ({"cuda"} if build_info()["cuda_operators"] else set()))

#: Whether `attention_with_scores` runs its own CUDA kernel where that supports the tensors. The kernel has
#: only been tested on the CPU, and its speed was never measured. Until it is known to be faster than
#: PyTorch's attention plus `class_attention`, those run instead. Set this to True to try the kernel.
CUDA_ATTENTION = False


def _tiled() -> frozenset[torch.dtype]:
    """Return the dtypes whose products only PyTorch's attention computes on the processor's tiles (AMX)."""
    # Private, as the public torch.cpu.get_capabilities is younger than torch 2.10.
    supported = {
        torch.bfloat16: getattr(torch.cpu, "_is_amx_tile_supported", None),
        torch.float16: getattr(torch.cpu, "_is_amx_fp16_supported", None),
    }
    own = {torch.bfloat16} if build_info()["cpu_capability"] == "amx_bf16" else set()
    return frozenset(dtype for dtype, asks in supported.items() if asks is not None and asks()) - own


#: The dtypes in which PyTorch's attention and `class_attention` run instead of the CPU's kernel of
#: `attention_with_scores`: without tiles, it took 1.3 to 2.6 times as long in bfloat16 as PyTorch's does on
#: them (Sapphire Rapids, torch 2.14), and with them (EVIT_CPU_CAPABILITY=amx_bf16) it was not measured. Set
#: this to frozenset() to run the kernel.
TILED = _tiled()

_CAPABILITIES = ("baseline", "avx2", "avx512", "avx512_bf16", "amx_bf16")


def _warn_of_capability(wanted: str | None) -> None:
    """Say so if the operators do not use the instruction level that EVIT_CPU_CAPABILITY asks for."""
    used = build_info()["cpu_capability"]
    if wanted and wanted not in _CAPABILITIES:
        fault = f"must be one of {', '.join(_CAPABILITIES)}, got {shown(wanted)}"
    elif wanted and wanted != used:
        fault = f"asks for {wanted}, which this machine does not have"
    else:
        return
    warnings.warn(f"EVIT_CPU_CAPABILITY {fault}: the operators use {used}", stacklevel=2)


_warn_of_capability(os.environ.get("EVIT_CPU_CAPABILITY"))


#: Set while :func:`use_reference` is active.
_reference_only = False


@contextmanager
def use_reference(enabled: bool = True) -> Iterator[None]:
    """Run the operators' PyTorch reference instead of their kernels while the context is open.

    The reference can be differentiated any number of times, the kernels once: gradient penalties and Hessians
    need it. It applies to all threads of the process, and to models that :func:`evit_ext.apply` changed too.
    The backward may come after the context. PyTorch's scaled_dot_product_attention, which other blocks call,
    is differentiable once unless ``torch.nn.attention.sdpa_kernel(SDPBackend.MATH)`` is active as well.

    Args:
        enabled: False runs the kernels again, inside a context with True.

    Example:
        >>> with evit_ext.ops.use_reference(), sdpa_kernel(SDPBackend.MATH):
        ...     (gradient,) = torch.autograd.grad(vit(images).sum(), images, create_graph=True)
        >>> gradient.square().sum().backward()
    """
    global _reference_only
    before, _reference_only = _reference_only, enabled
    try:
        yield
    finally:
        _reference_only = before


def runs_kernel(*tensors: Tensor) -> bool:
    """Return whether the operator runs its kernel on `tensors`; if not, the reference runs.

    The reference runs on devices without kernels, and where the operators' gradients are not enough: under
    transforms of torch.func and in forward-mode differentiation.
    """
    return tensors[0].device.type in KERNEL_DEVICES and not wants_reference(*tensors)


def wants_reference(*tensors: Tensor) -> bool:
    """Return whether the reference must run on `tensors`, whatever their device has."""
    if _reference_only or checks.in_function_transform():
        return True
    if torch.compiler.is_compiling():
        return False
    forward_mode = forward_ad._current_level >= 0
    return forward_mode and any(forward_ad.unpack_dual(t).tangent is not None for t in tensors)


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Return whether autograd needs a gradient of one of `tensors`."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def refuse_gradient(operator: str, message: str) -> None:
    """Make an operator raise when it is differentiated, instead of giving zeros or no gradient."""

    def refuse(ctx: Any, *grads: Tensor) -> NoReturn:
        raise RuntimeError(message)

    torch.library.register_autograd(f"evit::{operator}", refuse)


def refuse_double_backward(operator: str) -> None:
    """Make the backward of an operator raise when it is differentiated."""
    refuse_gradient(
        f"{operator}_backward",
        f"evit_ext.ops.{operator} is differentiable once; for higher derivatives run the model inside "
        f"`with evit_ext.ops.use_reference():`, or call evit_ext.ops.reference.{operator}",
    )
