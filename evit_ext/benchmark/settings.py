"""Copies PyTorch settings that affect a call's speed or result to another process."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable
from typing import Any

import torch

from evit_ext.ops import library

#: Settings by name, each with functions to read and set it. General settings come before specific ones: each
#: float32 precision follows the more general one unless it was set itself.
_FUNCTIONS: dict[str, tuple[Callable[[], Any], Callable[[Any], object]]] = {
    "threads": (torch.get_num_threads, torch.set_num_threads),
    "interop threads": (torch.get_num_interop_threads, torch.set_num_interop_threads),
    "default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "default device": (torch.get_default_device, torch.set_default_device),
    "deterministic algorithms": (
        lambda: (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        ),
        lambda value: torch.use_deterministic_algorithms(value[0], warn_only=value[1]),
    ),
    "flash attention": (torch.backends.cuda.flash_sdp_enabled, torch.backends.cuda.enable_flash_sdp),
    "memory-efficient attention": (
        torch.backends.cuda.mem_efficient_sdp_enabled,
        torch.backends.cuda.enable_mem_efficient_sdp,
    ),
    "attention by plain operators": (
        torch.backends.cuda.math_sdp_enabled,
        torch.backends.cuda.enable_math_sdp,
    ),
    "cuDNN's attention": (torch.backends.cuda.cudnn_sdp_enabled, torch.backends.cuda.enable_cudnn_sdp),
    "reductions of plain attention": (
        torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed,
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp,
    ),
    "float32 products": (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
}

_ATTRIBUTES = (
    "utils.deterministic.fill_uninitialized_memory",
    "backends.mkldnn.enabled",
    "backends.mkldnn.deterministic",
    "backends.cudnn.enabled",
    "backends.cudnn.benchmark",
    "backends.cudnn.benchmark_limit",
    "backends.cudnn.deterministic",
    "backends.cuda.matmul.allow_fp16_reduced_precision_reduction",
    "backends.cuda.matmul.allow_bf16_reduced_precision_reduction",
    "backends.cuda.matmul.allow_fp16_accumulation",
    "backends.fp32_precision",
    "backends.mkldnn.fp32_precision",
    "backends.mkldnn.matmul.fp32_precision",
    "backends.mkldnn.conv.fp32_precision",
    "backends.mkldnn.rnn.fp32_precision",
    "backends.cuda.matmul.fp32_precision",
    "backends.cudnn.fp32_precision",
    "backends.cudnn.conv.fp32_precision",
    "backends.cudnn.rnn.fp32_precision",
)


def read_settings() -> dict[str, Any]:
    """Return the settings of this process by name, for :func:`apply_settings`; they can be pickled."""
    found = {}
    for name, (read, _) in _FUNCTIONS.items():
        # Reading the general float32 precision fails if it was set per backend; the attributes carry those.
        with contextlib.suppress(RuntimeError):
            found[name] = read()
    for name in _ATTRIBUTES:
        found[name] = operator.attrgetter(name)(torch)
    found["CUDA_ATTENTION"] = library.CUDA_ATTENTION
    return found


def apply_settings(settings: dict[str, Any]) -> None:
    """Apply settings that :func:`read_settings` returned in another process, where they differ from here."""
    for name, (read, write) in _FUNCTIONS.items():
        if name in settings and read() != settings[name]:
            write(settings[name])
    for name in _ATTRIBUTES:
        owner, _, attribute = name.rpartition(".")
        holder = operator.attrgetter(owner)(torch)
        if getattr(holder, attribute) != settings[name]:
            setattr(holder, attribute, settings[name])
    library.CUDA_ATTENTION = settings["CUDA_ATTENTION"]
