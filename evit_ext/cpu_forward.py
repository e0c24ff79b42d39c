"""What attentions and MLPs compute on the CPU, in fewer passes over memory.

Attention goes through :func:`evit_ext.ops.attention_with_scores`, in training as well, straight from the
packed projection where nothing is done to queries and keys; and, without gradients, linear layers through
oneDNN with bias and GELU in the product's last pass, where ``F.linear`` copies the bias into the result first
and GELU is a pass of its own. Results differ by rounding; so :func:`evit_ext.apply` switches this on only
where a keep rate is below 1. Whatever is not known to compute the same runs as it was written: under
``torch.export``, the transforms of ``torch.func`` and forward-mode differentiation, with hooks or a forward
put in the place of a class's, with dropout, masks and biases between places.
``torch.nn.attention.sdpa_kernel`` chooses among PyTorch's attentions only; timm's own switch, ``fused_attn``,
is heeded.

Notation: B batch, H heads, N tokens, C channels.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from evit_ext import _C, packed_weights
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
    """In the place of the ``forward`` of a module whose blocks may compute as this module does.

    It stays in place while `active` is False: put there anew, it would be another object to torch.compile,
    which would compile everything again.
    """

    active = True


def runs_on(x: Tensor, with_gradient: bool = False) -> bool:
    """Return whether this module may compute with `x`: on the CPU, and nobody exports.

    Nor differentiates, unless what is to be computed offers that `with_gradient`.
    """
    # Grad mode alone decides, not whether a tensor requires grad: the weights do.
    if torch.is_grad_enabled() and not with_gradient:
        return False
    # The type first: that of a proxy of torch.fx is all that may be asked about it.
    if not SUPPORTED or type(x) is not Tensor or x.device.type != "cpu" or checks.in_function_transform():
        return False
    if torch.compiler.is_compiling():
        # To the compiler of torch 2.10 all is exporting: there, compiled models run as timm wrote them.
        return not torch.compiler.is_exporting()
    # What is traced is to be moved elsewhere, as what is exported. no_grad does not end forward mode.
    return not torch.jit.is_tracing() and forward_ad._current_level < 0


#: The forwards of classes as they were written, which somebody may put another in the place of.
_WRITTEN: dict[type[nn.Module], Any] = {}


def remember(*kinds: type[nn.Module]) -> None:
    """Take the forwards that these classes have now for those that they were written with."""
    _WRITTEN.update({kind: kind.forward for kind in kinds})


remember(nn.Linear, nn.Identity, nn.GELU, nn.Dropout)


def as_written(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Return whether `module` computes what `kind` does, and nobody wants to see it being called."""
    if type(module) is not kind or kind.forward is not _WRITTEN[kind] or "forward" in module.__dict__:
        return False
    return not module._forward_hooks and not module._forward_pre_hooks


def _globally_watched() -> bool:
    return torch.nn.modules.module._has_any_global_hook()


def may_replace(module: nn.Module, x: Tensor, with_gradient: bool = False) -> bool:
    """Return whether `module`, whose ``forward`` is overridden, may compute as this module does of `x`.

    Asked of the override, so that a block computes the same bits whoever runs it: timm's with keep rate 1.
    """
    override = module.__dict__.get("forward")
    if not isinstance(override, CpuForward) or not override.active:
        return False
    return type(module).forward is _WRITTEN.get(type(module)) and runs_on(x, with_gradient)


def may_attend(attention: Any, x: Tensor) -> bool:
    """Return whether one of timm's attentions, without mask and bias, may attend with our kernel."""
    # timm's switch is off for those who want to see the map.
    if not may_replace(attention, x, with_gradient=True) or not attention.fused_attn or not attends(x):
        return False
    dropout = attention.training and attention.attn_drop.p > 0
    return not dropout and getattr(attention, "relative_position_bias_table", None) is None


def attends(*tensors: Tensor) -> bool:
    """Return whether our attention kernel is for the dtype of `tensors`, or for what autocast casts to."""
    if checks.autocast_enabled("cpu"):
        return torch.get_autocast_dtype("cpu") in _ATTENTION_DTYPES
    return tensors[0].dtype in _ATTENTION_DTYPES and len({t.dtype for t in tensors}) == 1


def is_identity(module: nn.Module) -> bool:
    """Return whether `module` returns what it is given, and nobody watches."""
    return as_written(module, nn.Identity)


def pack(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return [B, H, N, D] thrice as [B, N, 3 * H * D]: one copy."""
    return torch.stack([t.transpose(1, 2) for t in (q, k, v)], dim=2).flatten(2)


def linear(layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return what a linear layer makes of `x`, for which :func:`runs_on`, be it with gradient.

    A `bias` takes the place of the layer's own, whose forward then does not run.
    """
    out: Tensor
    if _fuses(layer, x, bias) and not _globally_watched():
        weight = packed_weights.weight_of(layer)
        out = _linear_pointwise(x, weight, layer.bias if bias is None else bias, "none", [], "")
    else:
        out = layer(x) if bias is None else F.linear(x, layer.weight, bias)
    return out


def _fuses(layer: Any, x: Tensor, bias: Tensor | None = None) -> bool:
    """Return whether oneDNN may compute a linear layer of `x`, with its own bias or another."""
    if not as_written(layer, nn.Linear) or x.dtype not in _LINEAR_DTYPES or x.numel() == 0:
        return False
    if torch.is_grad_enabled():
        return False  # oneDNN's product has none
    if torch.compiler.is_compiling() or checks.autocast_enabled("cpu") or not torch._C._get_mkldnn_enabled():
        return False  # a compiler fuses by itself
    weight, own = layer.weight, layer.bias if bias is None else bias
    if type(weight) is not nn.Parameter or weight.layout is not torch.strided or not _same_kind(weight, x):
        return False
    # oneDNN is told the bias' address, not its strides.
    return own is None or (_same_kind(own, x) and own.shape == weight.shape[:1] and own.is_contiguous())


def _same_kind(value: Tensor, x: Tensor) -> bool:
    return value.dtype == x.dtype and value.device == x.device


def gelu_between(first: Any, approximate: str, second: nn.Module, x: Tensor) -> Tensor | None:
    """Return two linear layers of `x` with a GELU between; None where oneDNN may not compute the first."""
    if not _fuses(first, x) or _globally_watched():
        return None
    weight = packed_weights.weight_of(first)
    hidden = _linear_pointwise(x, weight, first.bias, "gelu", [], approximate)
    return linear(second, hidden)


def mlp(module: Any, x: Tensor) -> Tensor | None:
    """Return timm's ``Mlp`` of `x`, for which :func:`runs_on`; None where it has to run as timm wrote it."""
    for dropout in (module.drop1, module.drop2):
        if not as_written(dropout, nn.Dropout) or (dropout.training and dropout.p > 0):
            return None
    # An older timm has no norm there.
    norm = getattr(module, "norm", None)
    if (norm is not None and not is_identity(norm)) or not as_written(module.act, nn.GELU):
        return None
    return gelu_between(module.fc1, module.act.approximate, module.fc2, x)
