"""Argument checks shared by the operators and their reference.

Each function raises the error that its operator documents, naming what was expected and what was given. They
are in Python because C++ exceptions cannot be raised as ValueError, TypeError or IndexError.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from evit_ext._util.messages import shown

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

#: Device types with autocast. Computed once: torch raises for others (meta), and 2.10 cannot trace the call.
AUTOCAST_DEVICES = frozenset(t for t in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(t))


def autocast_enabled(device_type: str) -> bool:
    """Return whether autocast is on for a device type; False for those without autocast."""
    return device_type in AUTOCAST_DEVICES and torch.is_autocast_enabled(device_type)


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Return a context without autocast, so that products of tensors cast to float32 stay in float32."""
    return torch.autocast(device_type, enabled=False) if device_type in AUTOCAST_DEVICES else nullcontext()


def autocast(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """If autocast is on, cast queries and keys as it does for scaled_dot_product_attention."""
    if not isinstance(q, Tensor) or not isinstance(k, Tensor):
        return q, k  # the checks report the error
    return autocast_one(q), autocast_one(k)


def autocast_one(value: Tensor) -> Tensor:
    """Cast one tensor as :func:`autocast` casts two."""
    if not isinstance(value, Tensor) or not autocast_enabled(value.device.type):
        return value
    castable = value.dtype in (torch.float32, torch.float16, torch.bfloat16)
    return value.to(torch.get_autocast_dtype(value.device.type)) if castable else value


def _tensor(name: str, value: object, dim: int, shape: str) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor of shape {shape}, got {type(value).__name__}")
    if value.dim() != dim:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(value.shape)}")


def _sizes(name: str, value: Tensor, shape: str, *sizes: int) -> None:
    if any(size != expected for size, expected in zip(value.shape, sizes, strict=True)):
        raise ValueError(f"{name} must have shape {shape} = {sizes}, got {tuple(value.shape)}")


def _floating(name: str, value: Tensor) -> None:
    if value.dtype not in DTYPES:
        raise TypeError(f"{name} must be float32, float16, bfloat16 or float64, got {value.dtype}")


def same_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Raise ValueError unless both are on one device."""
    if value.device != other.device:
        raise ValueError(
            f"{name} and {other_name} must be on one device, got {value.device} and {other.device}"
        )


def _readable(numbers: Tensor) -> bool:
    """Return whether the values of `numbers` can be checked without cost.

    They can on the CPU (elsewhere a check would wait for the device) and outside of tracing. The kernels
    check again and never access memory out of bounds.
    """
    if numbers.device.type != "cpu" or not numbers.numel() or torch.compiler.is_compiling():
        return False
    return type(numbers) in (Tensor, torch.nn.Parameter) and not in_function_transform()


def _index(index: Tensor, batch: int, num_tokens: int, x: Tensor, name: str = "index") -> None:
    if index.dtype != torch.int64:
        raise TypeError(f"{name} must be int64, got {index.dtype}")
    same_device(name, index, "x", x)
    if index.shape[0] != batch:
        raise ValueError(f"{name} must have the batch size of x, {batch}, got shape {tuple(index.shape)}")
    if _readable(index):
        low, high = (int(bound) for bound in index.aminmax())
        if low < 0 or high >= num_tokens:
            raise IndexError(f"{name} must be in [0, {num_tokens}), got {low if low < 0 else high}")


# Asked while the compiler traces, which applies the transforms then, and again where others are around what
# it compiled. Were the question itself traced, the answer would always be yes.
@torch.compiler.assume_constant_result
def in_function_transform() -> bool:
    """Return whether a transform of torch.func (vmap, jvp, grad …) is being applied."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def _integer(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which `dtype` values are summed: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _number(name: str, value: object, expected: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be {expected}, got {type(value).__name__}")
    return float(value)


def _queries_and_keys(q: Tensor, k: Tensor) -> None:
    _floating("q", q)
    _floating("k", k)
    if q.dtype != k.dtype:
        raise TypeError(f"q and k must have one dtype, got {q.dtype} and {k.dtype}")
    same_device("q", q, "k", k)


def class_attention(q: Tensor, k: Tensor, scale: float | None, logsumexp: Tensor | None = None) -> float:
    """Check `q` [B, H, D], `k` [B, H, N, D] and `logsumexp` [B, H]; return the scale (default D ** -0.5)."""
    _tensor("q", q, 3, "[B, H, D]")
    _tensor("k", k, 4, "[B, H, N, D]")
    _queries_and_keys(q, k)
    if (q.shape[0], q.shape[1], q.shape[2]) != (k.shape[0], k.shape[1], k.shape[3]):
        raise ValueError(
            f"q [B, H, D] and k [B, H, N, D] must agree in B, H and D, "
            f"got {tuple(q.shape)} and {tuple(k.shape)}"
        )
    if q.shape[1] < 1 or q.shape[2] < 1 or k.shape[2] < 1:
        raise ValueError(f"k must have at least one head, token and channel, got shape {tuple(k.shape)}")
    if logsumexp is not None:
        _tensor("logsumexp", logsumexp, 2, "[B, H]")
        if logsumexp.dtype != accumulation_dtype(k.dtype):
            raise TypeError(
                f"logsumexp must be {accumulation_dtype(k.dtype)} for {k.dtype} keys, got {logsumexp.dtype}"
            )
        same_device("logsumexp", logsumexp, "k", k)
        _sizes("logsumexp", logsumexp, "[B, H]", *k.shape[:2])
    return float(q.shape[2]) ** -0.5 if scale is None else _number("scale", scale, "a float or None")


def mean_attention(q: Tensor, k: Tensor, scale: float | None) -> float:
    """Check `q` [B, H, M, D] and `k` [B, H, N, D]; return the scale (default D ** -0.5)."""
    _tensor("q", q, 4, "[B, H, M, D]")
    _tensor("k", k, 4, "[B, H, N, D]")
    _queries_and_keys(q, k)
    if (q.shape[0], q.shape[1], q.shape[3]) != (k.shape[0], k.shape[1], k.shape[3]):
        raise ValueError(
            f"q [B, H, M, D] and k [B, H, N, D] must agree in B, H and D, "
            f"got {tuple(q.shape)} and {tuple(k.shape)}"
        )
    for name, tensor in (("q", q), ("k", k)):
        if tensor.shape[1] < 1 or tensor.shape[2] < 1 or tensor.shape[3] < 1:
            raise ValueError(
                f"{name} must have at least one head, token and channel, got shape {tuple(tensor.shape)}"
            )
    return float(q.shape[3]) ** -0.5 if scale is None else _number("scale", scale, "a float or None")


def attention_with_scores(
    qkv: Tensor, num_heads: int, scale: float | None, key_bias: Tensor | None = None, mean: bool = False
) -> float:
    """Check `qkv` [B, N, 3 * C] with C a multiple of `num_heads`, `key_bias` [B, N] and `mean`.

    Return the scale (default D ** -0.5).
    """
    _tensor("qkv", qkv, 3, "[B, N, 3 * C]")
    _floating("qkv", qkv)
    _integer("num_heads", num_heads)
    if num_heads < 1:
        raise ValueError(f"num_heads must be at least 1, got {num_heads}")
    if qkv.shape[2] < 1 or qkv.shape[2] % (3 * num_heads) != 0:
        raise ValueError(
            f"qkv must have 3 * num_heads * D channels with num_heads = {num_heads} and D at least 1, "
            f"got shape {tuple(qkv.shape)}"
        )
    if key_bias is not None:
        _tensor("key_bias", key_bias, 2, "[B, N]")
        _floating("key_bias", key_bias)
        same_device("key_bias", key_bias, "qkv", qkv)
        _sizes("key_bias", key_bias, "[B, N] of qkv", *qkv.shape[:2])
    if not isinstance(mean, bool):
        raise TypeError(f"mean must be a bool, got {type(mean).__name__}")
    if scale is None:
        return float(qkv.shape[2] // (3 * num_heads)) ** -0.5
    return _number("scale", scale, "a float or None")


def gather_tokens(x: Tensor, index: Tensor) -> None:
    """Check `x` [B, N, C] and `index` [B, K] with values in [0, N)."""
    _tensor("x", x, 3, "[B, N, C]")
    _tensor("index", index, 2, "[B, K]")
    _floating("x", x)
    _index(index, x.shape[0], x.shape[1], x)


def scatter_tokens(x: Tensor, index: Tensor, num_tokens: int) -> None:
    """Check `x` [B, K, C] and `index` [B, K] with values in [0, num_tokens)."""
    _tensor("x", x, 3, "[B, K, C]")
    _tensor("index", index, 2, "[B, K]")
    _floating("x", x)
    _integer("num_tokens", num_tokens)
    if num_tokens < 0:
        raise ValueError(f"num_tokens must not be negative, got {num_tokens}")
    if index.shape[1] != x.shape[1]:
        raise ValueError(
            f"x [B, K, C] and index [B, K] must agree in K, got {tuple(x.shape)} and {tuple(index.shape)}"
        )
    _index(index, x.shape[0], num_tokens, x)


def fuse_tokens(x: Tensor, weights: Tensor, index: Tensor) -> None:
    """Check `x` [B, N, C], `weights` [B, N] and `index` [B, K] with values in [0, N)."""
    _tensor("x", x, 3, "[B, N, C]")
    _tensor("weights", weights, 2, "[B, N]")
    _tensor("index", index, 2, "[B, K]")
    _floating("x", x)
    _floating("weights", weights)
    same_device("weights", weights, "x", x)
    _sizes("weights", weights, "[B, N] of x", *x.shape[:2])
    _index(index, x.shape[0], x.shape[1], x)


def merge_tokens(
    x: Tensor, owner: Tensor, num_out: int, weights: Tensor | None, num_prefix_tokens: int
) -> None:
    """Check `x` [B, N, C], `owner` [B, N − P] with values in [0, num_out), and `weights` [B, N − P]."""
    _tensor("x", x, 3, "[B, N, C]")
    _tensor("owner", owner, 2, "[B, N − num_prefix_tokens]")
    _floating("x", x)
    _integer("num_out", num_out)
    _integer("num_prefix_tokens", num_prefix_tokens)
    if num_out < 0:
        raise ValueError(f"num_out must not be negative, got {num_out}")
    if not 0 <= num_prefix_tokens <= x.shape[1]:
        raise ValueError(f"num_prefix_tokens must be in [0, {x.shape[1]}], got {num_prefix_tokens}")
    shape = (x.shape[0], x.shape[1] - num_prefix_tokens)
    if num_out == 0 and shape[1] > 0:
        raise ValueError(f"num_out must be at least 1 for {shape[1]} patches, got 0")
    _sizes("owner", owner, "[B, N − num_prefix_tokens]", *shape)
    _index(owner, x.shape[0], num_out, x, "owner")
    if weights is None:
        return
    _tensor("weights", weights, 2, "[B, N − num_prefix_tokens]")
    _floating("weights", weights)
    same_device("weights", weights, "x", x)
    _sizes("weights", weights, "[B, N − num_prefix_tokens]", *shape)


def bipartite_matching(keys: Tensor, num_out: int) -> None:
    """Check `keys` [B, H, N, D] and N − floor(N / 2) ≤ num_out ≤ N."""
    _tensor("keys", keys, 4, "[B, H, N, D]")
    _floating("keys", keys)
    _integer("num_out", num_out)
    if keys.shape[1] < 1 or keys.shape[3] < 1:
        raise ValueError(f"keys must have at least one head and channel, got shape {tuple(keys.shape)}")
    num_tokens = keys.shape[2]
    least = num_tokens - num_tokens // 2
    if not least <= num_out <= num_tokens:
        expected = f"[{least}, {num_tokens}] for {num_tokens} tokens: at most half are merged"
        raise ValueError(f"num_out must be in {expected}, got {num_out}")


def reorganize_tokens(x: Tensor, scores: Tensor, num_keep: int, num_prefix_tokens: int, fuse: bool) -> None:
    """Check `x` [B, N, C], `scores` [B, N] or [B, N − P], 0 ≤ P < N and 1 ≤ num_keep ≤ N − P."""
    _tensor("x", x, 3, "[B, N, C]")
    _tensor("scores", scores, 2, "[B, N] or [B, N − num_prefix_tokens]")
    _floating("x", x)
    _floating("scores", scores)
    same_device("scores", scores, "x", x)
    _integer("num_keep", num_keep)
    _integer("num_prefix_tokens", num_prefix_tokens)
    if not isinstance(fuse, bool):
        raise TypeError(f"fuse must be a bool, got {type(fuse).__name__}")
    num_tokens = x.shape[1]
    if not 0 <= num_prefix_tokens < num_tokens:
        raise ValueError(
            f"num_prefix_tokens must be in [0, {num_tokens}) for {num_tokens} tokens, got {num_prefix_tokens}"
        )
    num_patches = num_tokens - num_prefix_tokens
    if scores.shape[0] != x.shape[0] or (scores.shape[1] != num_tokens and scores.shape[1] != num_patches):
        raise ValueError(
            f"scores must have shape {(x.shape[0], num_tokens)} (all tokens) or "
            f"{(x.shape[0], num_patches)} (patch tokens), got {tuple(scores.shape)}"
        )
    if not 1 <= num_keep <= num_patches:
        raise ValueError(
            f"num_keep must be in [1, {num_patches}], the number of patch tokens, got {num_keep}"
        )


def restore_tokens(
    tokens: Tensor, kept: Tensor, num_patches: int, num_prefix_tokens: int, fill: str | Tensor
) -> None:
    """Check `tokens` [B, P + K (+ 1), C], `kept` [B, K], ascending in [0, num_patches), and `fill`."""
    _tensor("tokens", tokens, 3, "[B, P + K (+ 1), C]")
    _tensor("kept", kept, 2, "[B, K]")
    _floating("tokens", tokens)
    if kept.dtype != torch.int64:
        raise TypeError(f"kept must be int64, got {kept.dtype}")
    same_device("kept", kept, "tokens", tokens)
    if kept.shape[0] != tokens.shape[0]:
        raise ValueError(
            f"kept must have the batch size of tokens, {tokens.shape[0]}, got shape {tuple(kept.shape)}"
        )
    _integer("num_patches", num_patches)
    _integer("num_prefix_tokens", num_prefix_tokens)
    if num_prefix_tokens < 0:
        raise ValueError(f"num_prefix_tokens must not be negative, got {num_prefix_tokens}")
    num_kept = kept.shape[1]
    if num_patches < num_kept:
        raise ValueError(
            f"num_patches must be at least {num_kept}, the number of kept patches, got {num_patches}"
        )
    without_fused = num_prefix_tokens + num_kept
    if tokens.shape[1] != without_fused and tokens.shape[1] != without_fused + 1:
        raise ValueError(
            f"tokens must have {without_fused} tokens (P = {num_prefix_tokens}, K = {num_kept}) or "
            f"{without_fused + 1} (with a fused one), got shape {tuple(tokens.shape)}"
        )
    _fill(fill, tokens, num_prefix_tokens + num_patches)
    if isinstance(fill, str) and fill == "fused":
        if num_kept == num_patches and tokens.shape[1] != without_fused:
            raise ValueError(
                f'tokens must have {without_fused} tokens with fill "fused" where every patch is kept, got '
                f"shape {tuple(tokens.shape)}"
            )
        if num_kept != num_patches and tokens.shape[1] == without_fused:
            raise ValueError(
                f'tokens must have {without_fused + 1} tokens with fill "fused", a fused one last, got shape '
                f"{tuple(tokens.shape)}"
            )
    if _readable(kept):
        low, high = (int(bound) for bound in kept.aminmax())
        if low < 0 or high >= num_patches:
            raise IndexError(f"kept must be in [0, {num_patches}), got {low if low < 0 else high}")
        if num_kept > 1 and bool((kept[:, 1:] <= kept[:, :-1]).any()):
            entry = int((kept[:, 1:] <= kept[:, :-1]).any(dim=1).nonzero()[0])
            raise ValueError(f"kept must be strictly ascending, got {kept[entry].tolist()}")


def _fill(fill: object, tokens: Tensor, num_tokens: int) -> None:
    expected = '"fused", "zero" or a tensor of shape [B, P + num_patches, C]'
    if isinstance(fill, str):
        if fill not in ("fused", "zero"):
            raise ValueError(f"fill must be {expected}, got {shown(fill)}")
        return
    if not isinstance(fill, Tensor):
        raise TypeError(f"fill must be {expected}, got {type(fill).__name__}")
    if fill.dtype != tokens.dtype:
        raise TypeError(f"fill and tokens must have one dtype, got {fill.dtype} and {tokens.dtype}")
    same_device("fill", fill, "tokens", tokens)
    shape = (tokens.shape[0], num_tokens, tokens.shape[2])
    if fill.dim() != 3 or any(a != b for a, b in zip(fill.shape, shape, strict=True)):
        raise ValueError(f"fill must have shape [B, P + num_patches, C] = {shape}, got {tuple(fill.shape)}")


def add_reorganize_norm(
    x: Tensor,
    branch: Tensor,
    scores: Tensor,
    num_keep: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    num_prefix_tokens: int,
    fuse: bool,
) -> float:
    """Check like `reorganize_tokens`, and `branch` [B, N, C], `weight` and `bias` [C]; return `eps`."""
    reorganize_tokens(x, scores, num_keep, num_prefix_tokens, fuse)
    _tensor("branch", branch, 3, "[B, N, C]")
    if branch.dtype != x.dtype:
        raise TypeError(f"branch and x must have one dtype, got {branch.dtype} and {x.dtype}")
    same_device("branch", branch, "x", x)
    if branch.shape != x.shape:
        raise ValueError(f"branch must have the shape of x, {tuple(x.shape)}, got {tuple(branch.shape)}")
    if x.shape[2] < 1:
        raise ValueError(f"x must have at least one channel, got shape {tuple(x.shape)}")
    for name, value in (("weight", weight), ("bias", bias)):
        if value is None:
            continue
        _tensor(name, value, 1, "[C]")
        if value.dtype != x.dtype:
            raise TypeError(f"{name} and x must have one dtype, got {value.dtype} and {x.dtype}")
        same_device(name, value, "x", x)
        if value.shape[0] != x.shape[2]:
            raise ValueError(f"{name} must have shape [C] = ({x.shape[2]},), got {tuple(value.shape)}")
    if _number("eps", eps, "a float") < 0:
        raise ValueError(f"eps must not be negative, got {eps}")
    return float(eps)
