"""What every operator module needs from the compiled library: its operators and where they have kernels."""

from __future__ import annotations

import torch

from evit_ext import _C  # importing it registers torch.ops.evit

#: Device types that have compiled kernels. Meta tensors go through the operators' shape inference.
KERNEL_DEVICES = frozenset({"cpu", "meta"} | ({"cuda"} if _C.build_info()["cuda_operators"] else set()))


def has_kernel(device: torch.device) -> bool:
    """Return whether the operators have a kernel for `device`; where not, the reference runs."""
    return device.type in KERNEL_DEVICES
