"""The precision to train and run in: chosen from what the processor supports, with the reason in words."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from evit_ext._util.messages import shown
from evit_ext.training.config import PRECISIONS


@dataclass(frozen=True)
class Precision:
    """`dtype` is the dtype of autocast (float32: no autocast); `reason` says why it was chosen."""

    dtype: torch.dtype
    reason: str

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} ({self.reason})"


def choose_precision(device: torch.device | str = "cpu", name: str = "auto") -> Precision:
    """Return bfloat16 if the device multiplies bfloat16 matrices in hardware, float32 otherwise.

    Args:
        device: where the model will run.
        name: "auto", or "float32", "bfloat16" or "float16" to override the choice.

    Raises:
        ValueError: another name.
    """
    if name not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(map(repr, PRECISIONS))}, got {shown(name)}")
    if name != "auto":
        return Precision(getattr(torch, name), "as asked")
    device = torch.device(device)
    if device.type == "cuda":
        if torch.cuda.get_device_capability(device) >= (8, 0):
            return Precision(torch.bfloat16, "the GPU has bfloat16 matrix units")
        return Precision(torch.float32, "the GPU has no bfloat16 matrix units")
    if device.type == "cpu":
        for feature, supported in _cpu_bfloat16_features().items():
            if supported:
                return Precision(torch.bfloat16, f"the processor has {feature}")
        return Precision(torch.float32, "the processor has no bfloat16 instructions that are known here")
    return Precision(torch.float32, f"bfloat16 was not tried on {device.type}")


def _cpu_bfloat16_features() -> dict[str, bool]:
    # `get_capabilities` is public but young; the two predicates are what older releases have.
    get_capabilities = getattr(torch.cpu, "get_capabilities", None)
    if get_capabilities is not None:
        has = get_capabilities()
        return {"AMX": bool(has.get("amx_bf16")), "AVX512_BF16": bool(has.get("avx512_bf16"))}
    predicates = {"AMX": "_is_amx_tile_supported", "AVX512_BF16": "_is_avx512_bf16_supported"}
    return {name: bool(getattr(torch.cpu, test, bool)()) for name, test in predicates.items()}


@contextmanager
def autocast(device: torch.device | str, precision: Precision) -> Iterator[None]:
    """Autocast to the precision; a float32 one changes nothing."""
    device = torch.device(device)
    enabled = precision.dtype != torch.float32
    with torch.autocast(device.type, dtype=precision.dtype if enabled else None, enabled=enabled):
        yield


@contextmanager
def attention_for_training(device: torch.device | str, precision: Precision) -> Iterator[None]:
    """Compose scaled_dot_product_attention of matrix products where its fused kernel is slow to train.

    On the CPU in 16 bits: the backward of the fused kernel was measured at four times the time of the float32
    one (batch 128, 65 tokens, 4 heads of 32 channels, torch 2.15, AVX512_BF16), which is half of a whole
    training step. Have it open around forward and backward: gradient checkpointing runs the forward again.
    Attentions that go through our own kernel (:mod:`evit_ext.cpu.forward`) are not concerned.
    """
    if torch.device(device).type == "cpu" and precision.dtype != torch.float32:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    else:
        yield
