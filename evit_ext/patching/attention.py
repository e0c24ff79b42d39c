"""Running an attention so that it also returns what a rule wants of it.

Three backends can compute it, and :func:`choose` says which:

* "kernel": :func:`evit_ext.ops.attention_with_scores` on the CPU, where it computes the same.
* "sdpa": PyTorch's scaled_dot_product_attention, and an operator for the scores.
* "module": the attention's own forward. It runs wherever other code may have a say in it: a forward or a
  class that was replaced, hooks, another attention function. Queries and keys for the scores are taken from
  its projections while it runs.

Notation: B batch, H heads, N tokens, P prefix tokens, C channels, D channels per head.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evit_ext import ops
from evit_ext._util.wrappers import unwrapped
from evit_ext.cpu import forward as cpu_forward
from evit_ext.cpu.replacing import is_replaced
from evit_ext.ops import checks

#: Applies a linear layer to a tensor; a bias that is not None replaces the layer's own.
Linear = Callable[[Any, Tensor, Tensor | None], Tensor]


class Wants(NamedTuple):
    """What an attention shall return besides its output.

    Attributes:
        scores: how much attention each token receives, [B, N].
        keys: the keys, [B, H, N, D].
        mean: the scores are those of all tokens on average, not those of the first token.
    """

    scores: bool = True
    keys: bool = False
    mean: bool = False


SCORES = Wants()
NOTHING_ELSE = Wants(scores=False)


class Attended(NamedTuple):
    """What :func:`attend` returns.

    Attributes:
        out: the attention's output, [B, N, C].
        scores: [B, N], float32 (float64 for float64), which sum to 1; None if not wanted.
        keys: [B, H, N, D]; None if not wanted.
    """

    out: Tensor
    scores: Tensor | None
    keys: Tensor | None


class Projected(NamedTuple):
    """Queries, keys and values.

    Attributes:
        q, k, v: [B, H, N, D], with norms and rotary embeddings.
        qkv: the packed projection [B, N, 3 * H * D] that they are views of, or None.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    qkv: Tensor | None


class AttentionKind(ABC):
    """How to run the attentions of a library."""

    @abstractmethod
    def classes(self) -> tuple[type[nn.Module], ...]:
        """Return the classes of attentions, whose subclasses count."""

    @abstractmethod
    def project(self, attention: Any, x: Tensor, linear: Linear, positions: Any) -> Projected:
        """Project `x` [B, N, C], with `linear` to apply a layer."""

    @abstractmethod
    def projections(self, attention: Any) -> list[nn.Module]:
        """Return the layers that make queries and keys, with their norms."""

    @abstractmethod
    def output(self, attention: Any, x: Tensor, attended: Tensor, linear: Linear) -> Tensor:
        """Return the output, given those of the heads [B, N, H * D]."""

    @abstractmethod
    def call(self, attention: Any, x: Tensor, positions: Any, bias: Tensor | None) -> Tensor:
        """Call the attention itself; return its output [B, N, C]."""

    @abstractmethod
    def dropout(self, attention: Any) -> float:
        """Return the probability that a weight is dropped now."""

    @abstractmethod
    def scale(self, attention: Any) -> float | None:
        """Return the factor of the products that the attention itself would use; None is ``D ** -0.5``."""

    @abstractmethod
    def is_sdpa(self, attention: Any) -> bool:
        """Return whether the attention itself would call scaled_dot_product_attention."""

    def is_watched(self, attention: Any) -> bool:
        """Return whether hooks would run if the attention were called."""
        return cpu_forward.is_watched(attention)

    def weigh(self, attention: Any, projected: Projected, bias: Tensor | None) -> Tensor:
        """Return the values, weighted by the attention: [B, H, N, D]."""
        q, k, v, _ = projected
        dropout, scale = self.dropout(attention), self.scale(attention)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout, scale=scale)


def choose(
    kind: AttentionKind, attention: Any, x: Tensor, bias: Tensor | None = None, in_forward: bool = False
) -> str:
    """Return which backend computes `attention` of `x`: "kernel", "sdpa" or "module"; see the module.

    Args:
        kind: of the attention.
        attention: the module.
        x: [B, N, C].
        bias: added to the scaled products, see :func:`attend`.
        in_forward: the attention was called already, and its hooks run around this.
    """
    if not in_forward and (kind.is_watched(attention) or not is_replaced(attention)):
        return "module"
    if not cpu_forward.has_written_forward(attention) or not kind.is_sdpa(attention):
        return "module"
    plain = kind.dropout(attention) == 0 and (bias is None or (is_key_bias(bias) and _is_of_each(bias, x)))
    on_kernel = plain and cpu_forward.attends(x)
    return "kernel" if on_kernel and cpu_forward.may_replace(attention, x, with_gradient=True) else "sdpa"


def is_key_bias(bias: Tensor | None) -> bool:
    """Return whether a bias, or a mask that is added, is one for each key: floating, [B, 1, 1, N]."""
    return bias is not None and bias.dim() == 4 and bias.shape[1:3] == (1, 1) and bias.is_floating_point()


def _is_of_each(bias: Tensor, x: Tensor) -> bool:
    """Return whether a bias of the keys has a row for each image of `x` [B, N, C], and is not broadcast."""
    return bias.shape[0] == x.shape[0] and bias.shape[3] == x.shape[1]


def attend(
    kind: AttentionKind,
    attention: Any,
    x: Tensor,
    wants: Wants = SCORES,
    positions: Any = None,
    bias: Tensor | None = None,
    backend: str | None = None,
) -> Attended:
    """Run an attention on `x` and also return what is wanted of it; no N × N map is formed for it.

    Args:
        kind: of the attention.
        attention: the module.
        x: normalised tokens [B, N, C], prefix tokens first.
        wants: what to return besides the output.
        positions: what the attention takes besides: rotary embeddings, or keyword arguments.
        bias: added to the scaled products, [B or 1, H or 1, N or 1, N]; [B, 1, 1, N] is one for each key.
        backend: what :func:`choose` returned, if it was asked already.
    """
    if backend is None:
        backend = choose(kind, attention, x, bias)
    if backend == "module":
        return _run_module(kind, attention, x, wants, positions, bias)
    linear = cpu_forward.linear if backend == "kernel" else apply_linear
    projected = kind.project(attention, x, linear, positions)
    q, k, v, qkv = projected
    scale = kind.scale(attention)
    scores: Tensor | None
    # On tiles PyTorch's attention is faster, and needs no packed projection.
    mean = wants.scores and wants.mean
    if backend == "kernel" and cpu_forward.attends(q, k, v) and (mean or not cpu_forward.has_tiles(q)):
        packed = cpu_forward.pack(q, k, v) if qkv is None else qkv
        named = {**_unusual(scale, q), "mean": mean}
        if bias is not None:
            named["key_bias"] = bias[:, 0, 0]
        out, scores = ops.attention_with_scores(packed, q.shape[1], **named)
        scores = scores if wants.scores else None
    else:
        out = kind.weigh(attention, projected, bias).transpose(1, 2).flatten(2)
        scores = _scores(q, k, wants, scale, bias)
    return Attended(kind.output(attention, x, out, linear), scores, k if wants.keys else None)


def _run_module(
    kind: AttentionKind, attention: Any, x: Tensor, wants: Wants, positions: Any, bias: Tensor | None
) -> Attended:
    """Run the attention's own forward; see :func:`attend`."""
    if not wants.scores and not wants.keys:
        return Attended(kind.call(attention, x, positions, bias), None, None)
    inner = unwrapped(attention)
    if not isinstance(inner, kind.classes()):
        raise RuntimeError(
            f"the attention became a {type(inner).__name__} after evit_ext.apply: its queries and keys are "
            "not known, so tokens get no scores; call evit_ext.remove first"
        )
    run = _run_hooked
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        if not attention._forward_pre_hooks and _is_own_forward(inner):
            # It sees the same input, so the projection may be computed again.
            out = kind.call(attention, x, positions, bias)
            projected = kind.project(attention, x, apply_linear, positions)
            return _scored(kind, attention, out, projected, wants, bias)
        if torch.compiler.is_exporting() or torch.jit.is_tracing():
            raise RuntimeError(
                "an attention with hooks before its forward, or with a forward of its own, cannot be "
                "exported or traced in a block that reorganises tokens: take them away first"
            )
        run = _run_outside_of_graphs
    out, projected = run(kind, attention, x, positions, bias)
    return _scored(kind, attention, out, projected, wants, bias)


def _is_own_forward(attention: nn.Module) -> bool:
    """Return whether the forward is that of a class that is known; FSDP makes subclasses that inherit it."""
    known = any(
        base.__dict__.get("forward") is type(attention).forward and cpu_forward.is_written(base)
        for base in type(attention).__mro__
    )
    return known and is_replaced(attention)


def _scored(
    kind: AttentionKind,
    attention: Any,
    out: Tensor,
    projected: Projected,
    wants: Wants,
    bias: Tensor | None,
) -> Attended:
    scores = _scores(projected.q, projected.k, wants, kind.scale(attention), bias)
    return Attended(out, scores, projected.k if wants.keys else None)


#: One thread at a time has hooks on an attention, whose calls by other threads they pass over.
_lock = threading.RLock()


def _run_hooked(
    kind: AttentionKind, attention: Any, x: Tensor, positions: Any, bias: Tensor | None
) -> tuple[Tensor, Projected]:
    """Call the attention, and take queries and keys from its projections while it runs."""
    thread = threading.get_ident()
    found: list[Projected] = []
    projected: dict[int, Tensor] = {}

    def keep(layer: nn.Module, args: Any, output: Tensor) -> None:
        if threading.get_ident() == thread:
            projected[id(layer)] = output

    def project(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        # Before the hooks that take parameters away again, as those of FSDP do, and with the input that the
        # module got of its own hooks.
        if threading.get_ident() == thread:
            given = args[0] if args else next(iter(named.values()))
            found.append(kind.project(module, given, again, positions))

    def again(layer: Any, given: Tensor, bias: Tensor | None) -> Tensor:
        known = projected.get(id(layer)) if bias is None else None
        return apply_linear(layer, given, bias) if known is None else known

    with _lock:
        hooks = [layer.register_forward_hook(keep) for layer in kind.projections(attention)]
        hooks.append(attention.register_forward_hook(project, prepend=True, with_kwargs=True))
        try:
            out = kind.call(attention, x, positions, bias)
        finally:
            for hook in hooks:
                hook.remove()
    return out, found[0]


#: The same where torch.compile leaves its graph for it: it does not follow hooks that come and go.
_run_outside_of_graphs = torch.compiler.disable(_run_hooked)


def _unusual(scale: float | None, q: Tensor) -> dict[str, Any]:
    """Return the scale as an argument where it is not the operators' default for `q` [..., D]."""
    return {} if scale is None or scale == q.shape[-1] ** -0.5 else {"scale": scale}


def _scores(q: Tensor, k: Tensor, wants: Wants, scale: float | None, bias: Tensor | None) -> Tensor | None:
    if not wants.scores:
        return None
    if wants.mean and bias is None:
        return ops.mean_attention(q, k, **_unusual(scale, q))
    return class_token_scores(q, k, bias, scale, wants.mean)


def class_token_scores(
    q: Tensor, k: Tensor, bias: Tensor | None = None, scale: float | None = None, mean: bool = False
) -> Tensor:
    """Return how much the first token attends to every token.

    Args:
        q, k: [B, H, N, D].
        bias: added to the scaled products, [B or 1, H or 1, N or 1, N], or None.
        scale: factor of the products; default ``D ** -0.5``.
        mean: how much all tokens attend to it on average, with a bias; the map is then formed.

    Returns:
        [B, N], float32 (float64 for float64), summing to 1: the mean over heads.
    """
    if bias is None:
        return ops.class_attention(q[:, :, 0], k, **_unusual(scale, q))
    # One row of the biased map. Not worth an operator: it is N products per head, and few models have a bias.
    # All rows are needed only where one rule merges tokens and a later one ranks them without a class token.
    rows = slice(None) if mean else slice(1)
    q, k = checks.autocast(q[:, :, rows], k)
    dtype = checks.accumulation_dtype(k.dtype)
    with checks.without_autocast(k.device.type):
        # Cast before the products, as the operator does: in float16 they could overflow.
        products = q.to(dtype) @ k.to(dtype).transpose(2, 3)
        scale = q.shape[3] ** -0.5 if scale is None else scale
        return (products * scale + bias[:, :, rows]).softmax(dim=-1).mean(dim=(1, 2))


def apply_linear(layer: Any, x: Tensor, bias: Tensor | None) -> Tensor:
    """Apply a linear layer to `x`; a bias that is not None replaces the layer's own."""
    out: Tensor = layer(x) if bias is None else F.linear(x, layer.weight, bias)
    return out
