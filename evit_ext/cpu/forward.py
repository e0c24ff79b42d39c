"""Attention and MLPs on the CPU, computed in fewer passes over memory.

Attention runs through :func:`evit_ext.ops.attention_with_scores`, in training as well, directly on the packed
projection if nothing changes queries and keys in between, unless PyTorch's runs on tiles (AMX). Without
gradients, linear layers run through oneDNN, which adds the bias and applies GELU in the product's last pass;
``F.linear`` would first copy the bias into the result, and GELU would be a separate pass. Patches are
projected as if by a linear layer (``evit_ext.cpu.patch_projection``), and plain blocks of timm run as a
whole, which calls none of their modules (``evit_ext.patching.families.whole_block``).

Results differ by rounding, so :func:`evit_ext.apply` switches this on only if a keep rate is below 1.
Whatever is not known to compute the same runs its original code: under ``torch.export``, the transforms of
``torch.func`` and forward-mode differentiation, with hooks or an overridden forward, and with dropout, masks
or position biases. ``torch.nn.attention.sdpa_kernel`` chooses among PyTorch's attentions only; timm's own
switch, ``fused_attn``, is heeded.

Notation: B batch, H heads, N tokens, C channels.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm
from torch import Tensor, nn
from torch.autograd import forward_ad

from evit_ext._util.compiled import build_info
from evit_ext.cpu import packed_weights
from evit_ext.ops import checks, library

#: Whether the processor has kernels that were measured to be faster than PyTorch's: not the portable ones.
SUPPORTED = build_info()["cpu_capability"] != "baseline"

#: float64 is left to scaled_dot_product_attention, which is as fast in inference. In training it takes 1.3
#: times as long, but few train in float64.
_ATTENTION_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})

#: oneDNN's product fused with the next operation, as torch.compile uses on the CPU; None if torch lacks it.
_linear_pointwise: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
_linear_binary: Any = getattr(_linear_pointwise, "binary", None)


def _linear_dtypes() -> frozenset[torch.dtype]:
    if _linear_binary is None or not torch.backends.mkldnn.is_available():
        return frozenset()
    in_bfloat16 = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)()
    return frozenset({torch.float32} | ({torch.bfloat16} if in_bfloat16 else set()))


_LINEAR_DTYPES = _linear_dtypes()


#: The attribute of a module that says whether its forward may be replaced by a faster one. It is a number of
#: the module and not an object, so that torch.compile makes one graph for all blocks of a kind.
ACTIVE = "_evit_cpu_forward"


def runs_on(x: Tensor, with_gradient: bool = False) -> bool:
    """Return whether the functions here may run on `x`: it is on the CPU, and nothing is being exported.

    Grad mode must be off too, unless the operation has a gradient (`with_gradient`).
    """
    # Only grad mode decides, not whether `x` requires grad: the weights do.
    if torch.is_grad_enabled() and not with_gradient:
        return False
    # The type first: that of a proxy of torch.fx is all that may be asked about it.
    if not SUPPORTED or type(x) is not Tensor or x.device.type != "cpu" or checks.in_function_transform():
        return False
    if torch.compiler.is_compiling():
        # In torch 2.10 this is always true while compiling, so compiled models run timm's code there.
        return not torch.compiler.is_exporting()
    # Traced models, like exported ones, may run elsewhere. no_grad does not end forward mode.
    if torch.jit.is_tracing() or forward_ad._current_level >= 0:
        return False
    # Functions that other code has put in the place of PyTorch's, or watches, must be called.
    own = F.scaled_dot_product_attention is _ATTENTION and F.gelu is _GELU and F.linear is _LINEAR
    return own and torch._C._len_torch_function_stack() == 0


#: The functions that the code here takes the place of.
_ATTENTION, _GELU = torch._C._nn.scaled_dot_product_attention, torch._C._nn.gelu
_LINEAR = torch._C._nn.linear

#: The original forwards of classes, to notice when other code replaces them.
_WRITTEN: dict[type[nn.Module], Any] = {}


def remember(*kinds: type[nn.Module]) -> None:
    """Record the forwards of these classes, unless other code has replaced them already."""
    _WRITTEN.update({kind: kind.forward for kind in kinds if _is_of_its_library(kind)})


def _is_of_its_library(kind: type[nn.Module]) -> bool:
    """Return whether the forward of a class is code of the library that the class is from."""
    owner = next(base for base in kind.__mro__ if "forward" in base.__dict__)
    package = sys.modules[owner.__module__.partition(".")[0]]
    code = getattr(owner.__dict__["forward"], "__code__", None)
    return code is not None and str(code.co_filename).startswith(str(Path(str(package.__file__)).parent))


def is_written(kind: type[nn.Module]) -> bool:
    """Return whether :func:`remember` knows a class, and its forward is still the one that it was."""
    return kind.forward is _WRITTEN.get(kind)


remember(nn.Linear, nn.Identity, nn.GELU, nn.Dropout, nn.LayerNorm, LayerNorm)

#: The attributes in which nn.Module keeps its hooks.
HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)
#: Those of all modules.
_GLOBAL_HOOKS = (
    "_global_forward_hooks",
    "_global_forward_pre_hooks",
    "_global_backward_hooks",
    "_global_backward_pre_hooks",
)


def is_watched(module: nn.Module) -> bool:
    """Return whether hooks would run if `module` were called, its own or those of all modules.

    Of those of all modules, PyTorch's own do not count: they are the FLOP counter's and the profiler's.
    """
    return any(getattr(module, hooks) for hooks in HOOKS) or _is_watched_everywhere()


def _is_watched_everywhere() -> bool:
    if not torch.nn.modules.module._has_any_global_hook():
        return False
    hooks = (getattr(torch.nn.modules.module, name).values() for name in _GLOBAL_HOOKS)
    return any(not str(hook.__module__).startswith("torch.") for every in hooks for hook in every)


def has_written_forward(module: nn.Module) -> bool:
    """Return whether the class of `module` is one that :func:`remember` knows, with its original forward."""
    kind = type(module)
    return kind.forward is _WRITTEN.get(kind)


def as_written(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Return whether `module` is exactly a `kind` with the original forward and without forward hooks."""
    if type(module) is not kind or kind.forward is not _WRITTEN.get(kind):
        return False
    own = module.__dict__
    return not (own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own)


def may_replace(module: nn.Module, x: Tensor, with_gradient: bool = False) -> bool:
    """Return whether the faster code may replace the forward of `module` on `x`.

    This depends on the module alone, so that a block gives the same bits from timm's code at keep rate 1.
    """
    if not module.__dict__.get(ACTIVE, False) or not has_written_forward(module):
        return False
    return runs_on(x, with_gradient)


def attends(*tensors: Tensor) -> bool:
    """Return whether our attention kernel takes the dtype of `tensors`, or the one that autocast casts to."""
    if checks.autocast_enabled("cpu"):
        return torch.get_autocast_dtype("cpu") in _ATTENTION_DTYPES
    return tensors[0].dtype in _ATTENTION_DTYPES and len({t.dtype for t in tensors}) == 1


def has_tiles(x: Tensor) -> bool:
    """Return whether PyTorch's attention is faster than our kernel on `x`; see `evit_ext.ops.library`."""
    if checks.autocast_enabled("cpu"):
        return torch.get_autocast_dtype("cpu") in library.TILED
    return x.dtype in library.TILED


#: Norms that compute F.layer_norm with their weight, bias and eps. Compared exactly, because a subclass is
#: free to compute something else.
LAYER_NORMS = (nn.LayerNorm, LayerNorm)


def is_identity(module: nn.Module) -> bool:
    """Return whether `module` is an unhooked nn.Identity."""
    return as_written(module, nn.Identity)


def pack(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return three tensors [B, H, N, D] packed into [B, N, 3 * H * D], with one copy."""
    return torch.stack([t.transpose(1, 2) for t in (q, k, v)], dim=2).flatten(2)


def linear(layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """Apply a linear layer to `x`, for which :func:`runs_on` holds, possibly with gradient.

    A `bias` replaces the layer's own; the layer's forward then does not run.
    """
    found = operands(layer, x, bias) if multiplies(x) else None
    out: Tensor
    if found is not None:
        out = product(x, found)
    else:
        out = layer(x) if bias is None else F.linear(x, layer.weight, bias)
    return out


#: Weight and bias of a linear layer, for oneDNN's product.
Operands = tuple[Tensor, Tensor | None]


def multiplies(x: Tensor) -> bool:
    """Return whether oneDNN may multiply `x`, for which :func:`runs_on` holds, by the weights of layers."""
    if x.dtype not in _LINEAR_DTYPES or x.numel() == 0 or torch.is_grad_enabled():
        return False  # it has no gradient
    if torch.compiler.is_compiling() or checks.autocast_enabled("cpu") or not torch._C._get_mkldnn_enabled():
        return False  # the compiler does its own fusion
    return not torch.nn.modules.module._has_any_global_hook()


def operands(layer: Any, x: Tensor, bias: Tensor | None = None) -> Operands | None:
    """Return weight and bias of a linear layer for `x`, which oneDNN multiplies; None if it may not here.

    A `bias` replaces the layer's own.
    """
    if not fits(layer, x, bias):
        return None
    weight, own = weights(layer)
    return weight, own if bias is None else bias


def fits(layer: Any, x: Tensor, bias: Tensor | None = None) -> bool:
    """Return whether oneDNN may multiply `x` by the weight of a linear layer; see :func:`operands`."""
    if not as_written(layer, nn.Linear):
        return False
    # Not by attribute, which takes nn.Module half a microsecond each time.
    parameters = layer._parameters
    weight, own = parameters.get("weight"), parameters.get("bias") if bias is None else bias
    # It is an attribute of another kind under pruning, and the bias with it may be.
    if type(weight) is not nn.Parameter or (own is None and layer.bias is not None):
        return False
    return fit(weight, own, x)


def fit(weight: Tensor, bias: Tensor | None, x: Tensor) -> bool:
    """Return whether a weight [out, in] and a bias [out] are of the kind that oneDNN multiplies `x` by."""
    if weight.layout is not torch.strided or not _same_kind(weight, x):
        return False
    # oneDNN gets the bias's address, not its strides.
    return bias is None or (_same_kind(bias, x) and bias.is_contiguous() and bias.shape == weight.shape[:1])


def weights(layer: Any) -> Operands:
    """Return weight and bias of a linear layer that :func:`fits`."""
    parameters = layer._parameters
    return packed_weights.weight_of(layer, parameters["weight"]), parameters["bias"]


def _same_kind(value: Tensor, x: Tensor) -> bool:
    """Return whether `value` has the dtype of `x`, and is on the CPU as well."""
    return value.dtype is x.dtype and value.is_cpu


def product(x: Tensor, by: Operands, approximate: str | None = None) -> Tensor:
    """Return the product of `x` and a layer's weights, with GELU after it if it is told which."""
    out: Tensor
    if approximate is None:
        out = _linear_pointwise(x, *by, "none", [], "")
    else:
        out = _linear_pointwise(x, *by, "gelu", [], approximate)
    return out


def add_product(x: Tensor, y: Tensor, by: Operands) -> Tensor:
    """Return the sum of `x` and the product of `y` and a layer's weights."""
    if not x.is_contiguous():  # oneDNN gets its address and sizes
        return x + product(y, by)
    out: Tensor = _linear_binary(y, x, *by, "add")
    return out


def gelu_between(first: Any, approximate: str, second: nn.Module, x: Tensor) -> Tensor | None:
    """Apply linear, GELU, linear to `x`; return None if oneDNN may not compute the first layer."""
    found = operands(first, x) if multiplies(x) else None
    return None if found is None else linear(second, product(x, found, approximate))


def gelu_of_mlp(module: Any) -> str | None:
    """Return how timm's ``Mlp`` approximates its GELU; None if it is more than linear, GELU, linear."""
    for dropout in (module.drop1, module.drop2):
        if not as_written(dropout, nn.Dropout) or (dropout.training and dropout.p > 0):
            return None
    # Older versions of timm have no norm here.
    norm = getattr(module, "norm", None)
    if (norm is not None and not is_identity(norm)) or not as_written(module.act, nn.GELU):
        return None
    approximate: str = module.act.approximate
    return approximate


def mlp(module: Any, x: Tensor) -> Tensor | None:
    """Apply timm's ``Mlp`` to `x`, for which :func:`runs_on` holds; return None if timm's code must run."""
    approximate = gelu_of_mlp(module)
    return None if approximate is None else gelu_between(module.fc1, approximate, module.fc2, x)
