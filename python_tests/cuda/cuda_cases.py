"""The operators as the CUDA tests call them, each with inputs and its reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from evit_ext import ops

HEADS, TOKENS, CHANNELS = 3, 50, 16
WIDTH = HEADS * CHANNELS
KEEP = 20
reference = ops.reference

# Error allowed, relative to the largest value expected: a few roundings of the element type.
TOLERANCE = {torch.float32: 4e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float64: 1e-14}


def make_attention(batch: int) -> tuple[Tensor, ...]:
    return torch.randn(batch, HEADS, CHANNELS), torch.randn(batch, HEADS, TOKENS, CHANNELS)


def make_attention_with_sum(batch: int) -> tuple[Tensor, ...]:
    q, k = make_attention(batch)
    logits = torch.einsum("bhd,bhnd->bhn", q, k) * CHANNELS**-0.5
    return q, k, logits.logsumexp(dim=-1)


def make_rows(batch: int) -> tuple[Tensor, ...]:
    return torch.randn(batch, TOKENS, WIDTH), torch.randint(0, TOKENS, (batch, KEEP))


def make_places(batch: int) -> tuple[Tensor, ...]:
    return torch.randn(batch, KEEP, WIDTH), torch.randint(0, TOKENS, (batch, KEEP))


def make_sum(batch: int) -> tuple[Tensor, ...]:
    x, index = make_rows(batch)
    return x, torch.rand(batch, TOKENS), index


def make_groups(batch: int) -> tuple[Tensor, ...]:
    owner = torch.randint(0, KEEP, (batch, TOKENS - 1))
    return torch.randn(batch, TOKENS, WIDTH), owner, torch.randint(1, 6, (batch, TOKENS - 1)).float()


def make_tokens(batch: int) -> tuple[Tensor, ...]:
    return torch.randn(batch, TOKENS, WIDTH), torch.randn(batch, TOKENS - 1).softmax(dim=1)


def make_block(batch: int) -> tuple[Tensor, ...]:
    x, scores = make_tokens(batch)
    return x, torch.randn_like(x), scores, torch.rand(WIDTH) + 0.5, torch.randn(WIDTH)


def make_kept(batch: int) -> Tensor:
    """The numbers of KEEP patches of each entry, ascending."""
    return torch.rand(batch, TOKENS - 1).argsort(dim=1)[:, :KEEP].sort(dim=1).values


def make_restored(batch: int) -> tuple[Tensor, ...]:
    return torch.randn(batch, KEEP + 2, WIDTH), make_kept(batch)


def make_filled(batch: int) -> tuple[Tensor, ...]:
    return torch.randn(batch, KEEP + 1, WIDTH), make_kept(batch), torch.randn(batch, TOKENS, WIDTH)


@dataclass(frozen=True)
class Operator:
    """How an operator is called and what it must give."""

    name: str
    make: Callable[[int], tuple[Tensor, ...]]  # inputs for a batch size: on the CPU, float32 and int64
    call: Callable[..., Any]
    reference: Callable[..., Any]
    #: The inputs that are cast to the dtype under test. The others, such as scores, keep theirs.
    cast: tuple[int, ...]
    #: The inputs that get a gradient; none for the operator that is only for inference.
    leaves: tuple[int, ...]
    #: The inputs whose numbers must ascend, or the kernel stops.
    ascending: tuple[int, ...] = ()

    def inputs(self, batch: int = 4, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
        """Inputs on the CPU, the same for the same seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            made = self.make(batch)
        return [t.to(dtype) if number in self.cast else t for number, t in enumerate(made)]

    def blank(self, inputs: list[Tensor]) -> list[Tensor]:
        """Zeros instead of the inputs, but for those that must ascend."""
        return [
            t.clone() if number in self.ascending else torch.zeros_like(t) for number, t in enumerate(inputs)
        ]


OPERATORS = [
    Operator(
        "class_attention", make_attention, ops.class_attention, reference.class_attention, (0, 1), (0, 1)
    ),
    Operator(
        "class_attention_logsumexp",
        make_attention_with_sum,
        lambda q, k, logsumexp: ops.class_attention(
            q, k, logsumexp=logsumexp.to(torch.promote_types(q.dtype, torch.float32))
        ),
        lambda q, k, logsumexp: reference.class_attention(q, k),
        (0, 1),
        (0, 1),
    ),
    Operator("gather_tokens", make_rows, ops.gather_tokens, reference.gather_tokens, (0,), (0,)),
    Operator(
        "scatter_tokens",
        make_places,
        lambda x, index: ops.scatter_tokens(x, index, TOKENS),
        lambda x, index: reference.scatter_tokens(x, index, TOKENS),
        (0,),
        (0,),
    ),
    Operator("fuse_tokens", make_sum, ops.fuse_tokens, reference.fuse_tokens, (0,), (0, 1)),
    Operator(
        "merge_tokens",
        make_groups,
        lambda x, owner, weights: ops.merge_tokens(x, owner, KEEP, weights),
        lambda x, owner, weights: reference.merge_tokens(x, owner, KEEP, weights),
        (0,),
        (0, 2),
    ),
    Operator(
        "bipartite_matching",
        lambda batch: make_attention(batch)[1:],
        lambda keys: ops.bipartite_matching(keys, TOKENS - KEEP),
        lambda keys: reference.bipartite_matching(keys, TOKENS - KEEP),
        (0,),
        (),
    ),
    Operator(
        "reorganize_tokens",
        make_tokens,
        lambda x, scores: ops.reorganize_tokens(x, scores, KEEP),
        lambda x, scores: reference.reorganize_tokens(x, scores, KEEP),
        (0,),
        (0, 1),
    ),
    Operator(
        "reorganize_tokens_dropping",
        make_tokens,
        lambda x, scores: ops.reorganize_tokens(x, scores, KEEP, fuse=False),
        lambda x, scores: reference.reorganize_tokens(x, scores, KEEP, fuse=False),
        (0,),
        (0,),
    ),
    Operator(
        "restore_tokens",
        make_restored,
        lambda tokens, kept: ops.restore_tokens(tokens, kept, TOKENS - 1),
        lambda tokens, kept: reference.restore_tokens(tokens, kept, TOKENS - 1),
        (0,),
        (0,),
        (1,),
    ),
    Operator(
        "restore_tokens_filling",
        make_filled,
        lambda tokens, kept, fill: ops.restore_tokens(tokens, kept, TOKENS - 1, 1, fill),
        lambda tokens, kept, fill: reference.restore_tokens(tokens, kept, TOKENS - 1, 1, fill),
        (0, 2),
        (0, 2),
        (1,),
    ),
    Operator(
        "add_reorganize_norm",
        make_block,
        lambda x, branch, scores, weight, bias: ops.add_reorganize_norm(
            x, branch, scores, KEEP, weight, bias
        ),
        lambda x, branch, scores, weight, bias: reference.add_reorganize_norm(
            x, branch, scores, KEEP, weight, bias
        ),
        (0, 1, 3, 4),
        (),
    ),
]


def run(operator: Operator, inputs: list[Tensor], function: Callable[..., Any] | None = None) -> list[Tensor]:
    """Outputs and, where the operator has any, gradients, for a weight of the output that is not constant."""
    function = function or operator.call
    if not operator.leaves:
        with torch.no_grad():
            return list(function(*inputs))
    values = [t.detach().requires_grad_(number in operator.leaves) for number, t in enumerate(inputs)]
    result = function(*values)
    results = list(result) if isinstance(result, tuple) else [result]
    # Made on the device: a copy would matter between streams and in graphs. It varies within every entry,
    # as the softmax has no gradient along a constant, of which only rounding would be compared. Multiples of
    # 1/64 below 1: exact in every dtype, the same on every device (CUDA divides by multiplying).
    numbers = torch.arange(results[0].numel(), device=results[0].device)
    weight = (numbers % 97).to(results[0].dtype) / 64 - 0.75
    leaves = [values[number] for number in operator.leaves]
    grads = torch.autograd.grad(results[0], leaves, weight.view(results[0].shape))
    return [t.detach() for t in (*results, *grads)]


def assert_same(actual: list[Tensor], expected: list[Tensor]) -> None:
    """Equal to the bit."""
    for number, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert torch.equal(a, b), f"result {number}: {int((a != b).sum())} of {a.numel()} elements differ"


def assert_near(actual: list[Tensor], expected: list[Tensor]) -> None:
    """Integers equal, values within what some roundings of their dtype make."""
    for a, b in zip(actual, expected, strict=True):
        if not a.is_floating_point():
            assert torch.equal(a.cpu(), b.cpu())
            continue
        assert a.shape == b.shape
        scale = float(b.abs().max()) if b.numel() else 1.0
        tolerance = TOLERANCE[a.dtype]
        torch.testing.assert_close(a.double().cpu(), b.double().cpu(), rtol=tolerance, atol=tolerance * scale)


class CalledOperators(TorchDispatchMode):
    """Names of the operators in torch.ops.evit that are called, gradients included."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "evit":
            self.names.add(func.name().removeprefix("evit::").split(".")[0])
        return func(*args, **(kwargs or {}))
