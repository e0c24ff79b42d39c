"""What timm's attentions and MLPs compute, on the CPU and without gradients, in fewer passes over memory.

Attention goes through :func:`evit_ext.ops.attention_with_scores`, straight from the packed projection, which
scaled_dot_product_attention would have permuted; and linear layers through oneDNN with bias and GELU in the
product's last pass, where ``F.linear`` copies the bias into the result first and GELU is a pass of its own.
Results differ from timm's by rounding; so :func:`evit_ext.apply` puts this in place only where a keep rate is
below 1. Whatever is not known to compute the same runs as timm wrote it: under autograd and
``torch.export``, with hooks or a forward put in the place of a class's, with dropout, masks and positions.

Notation: B batch, H heads, N tokens, C channels.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evit_ext import _C
from evit_ext.ops import checks
from evit_ext.override import Override

#: Whether the processor has kernels that were measured to be faster than PyTorch's: not the portable ones.
SUPPORTED = _C.build_info()["cpu_capability"] != "baseline"

#: In float64, scaled_dot_product_attention is as fast.
_ATTENTION_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})

#: oneDNN's product with what follows it, which torch.compile's CPU code calls; None where torch lacks it.
_linear_pointwise: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)


def _linear_dtypes() -> frozenset[torch.dtype]:
    if _linear_pointwise is None or not torch.backends.mkldnn.is_available():
        return frozenset()
    in_bfloat16 = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)()
    return frozenset({torch.float32} | ({torch.bfloat16} if in_bfloat16 else set()))


_LINEAR_DTYPES = _linear_dtypes()


class CpuForward(Override):
    """In the place of the ``forward`` of a module whose blocks may compute as this module does."""


def runs_on(x: Tensor) -> bool:
    """Return whether this module may compute with `x`: on the CPU, and nobody differentiates or exports."""
    # Grad mode alone decides, not whether a tensor requires grad: the weights do.
    if not SUPPORTED or torch.is_grad_enabled() or x.device.type != "cpu" or type(x) is not Tensor:
        return False
    if torch.compiler.is_compiling():
        # To the compiler of torch 2.10 all is exporting: there, compiled models run as timm wrote them.
        return not torch.compiler.is_exporting()
    return not checks.in_function_transform()


def _as_written(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Return whether `module` computes what `kind` does, and nobody wants to see it being called."""
    watched = module._forward_hooks or module._forward_pre_hooks
    return type(module) is kind and not watched and "forward" not in module.__dict__


def _globally_watched() -> bool:
    return torch.nn.modules.module._has_any_global_hook()


def attends(attention: Any, x: Tensor) -> bool:
    """Return whether one of timm's attentions, without mask and positions, may attend to `x` with our kernel.

    Queries and keys must be as they are projected: no norms, no biases between places, no dropout.
    """
    # Asked of the attention, so that a block computes the same bits whoever runs it: timm's with keep rate 1.
    if not isinstance(attention.__dict__.get("forward"), CpuForward):
        return False
    if not runs_on(x) or getattr(attention, "qkv", None) is None or not attention.fused_attn:
        return False
    in_autocast = checks.autocast_enabled("cpu")
    dtype = torch.get_autocast_dtype("cpu") if in_autocast else x.dtype
    if dtype not in _ATTENTION_DTYPES or getattr(attention, "relative_position_bias_table", None) is not None:
        return False
    if attention.training and attention.attn_drop.p > 0:
        return False
    norms = (getattr(attention, "q_norm", None), getattr(attention, "k_norm", None))
    return all(norm is None or _as_written(norm, nn.Identity) for norm in norms)


def linear(layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return what a linear layer makes of `x`, for which :func:`runs_on`.

    A `bias` takes the place of the layer's own, whose forward then does not run.
    """
    out: Tensor
    if _fuses(layer, x) and not _globally_watched():
        out = _linear_pointwise(x, layer.weight, layer.bias if bias is None else bias, "none", [], "")
    else:
        out = layer(x) if bias is None else F.linear(x, layer.weight, bias)
    return out


def _fuses(layer: Any, x: Tensor) -> bool:
    """Return whether oneDNN may compute a linear layer of `x`."""
    if not _as_written(layer, nn.Linear) or x.dtype not in _LINEAR_DTYPES or x.numel() == 0:
        return False
    if torch.compiler.is_compiling() or checks.autocast_enabled("cpu") or not torch._C._get_mkldnn_enabled():
        return False  # a compiler fuses by itself
    weight = layer.weight
    return type(weight) is nn.Parameter and weight.device.type == "cpu" and weight.dtype == x.dtype


def mlp(module: Any, x: Tensor) -> Tensor | None:
    """Return timm's ``Mlp`` of `x`; None where it has to run as timm wrote it."""
    if not runs_on(x) or not _fuses(module.fc1, x) or not _is_two_layers_and_gelu(module):
        return None
    x = _linear_pointwise(x, module.fc1.weight, module.fc1.bias, "gelu", [], module.act.approximate)
    return linear(module.fc2, x)


def _is_two_layers_and_gelu(mlp: Any) -> bool:
    """Return whether between the linear layers of an MLP there is a GELU, and nothing else is done."""
    for dropout in (mlp.drop1, mlp.drop2):
        if not _as_written(dropout, nn.Dropout) or (dropout.training and dropout.p > 0):
            return False
    # An older timm has no norm there.
    norm = getattr(mlp, "norm", None)
    without_norm = norm is None or _as_written(norm, nn.Identity)
    return without_norm and _as_written(mlp.act, nn.GELU) and not _globally_watched()
