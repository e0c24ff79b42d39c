"""Tests of evit_ext.ops.mean_attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from operator_tester import (
    DTYPES,
    Case,
    OperatorTester,
    assert_near,
    differentiable,
    random_examples,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from evit_ext import ops
from evit_ext.ops import library
from evit_ext.ops.mean_attention import BLOCK


def make(
    batch: int, heads: int, tokens: int, channels: int, queries: int | None = None, seed: int = 0
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows = tokens if queries is None else queries
    q = torch.randn(batch, heads, rows, channels, dtype=torch.float64, generator=generator)
    k = torch.randn(batch, heads, tokens, channels, dtype=torch.float64, generator=generator)
    return q, k


class TestMeanAttention(OperatorTester):
    operator = staticmethod(ops.mean_attention)
    reference = staticmethod(ops.reference.mean_attention)
    qualified_name = "mean_attention"
    scores_like = True
    # The largest errors seen: 0.04 of TOLERANCE in values, 0.43 in gradients.

    @staticmethod
    def cases() -> list[Case]:
        return [
            Case("small", make(2, 3, 7, 5)),
            Case("one token", make(1, 1, 1, 1)),
            Case("scale", make(2, 2, 17, 16), {"scale": 0.37}),
            Case("negative scale", make(1, 2, 5, 3), {"scale": -2.0}),
            Case("fewer queries", make(2, 2, 9, 4, queries=3)),
            Case("one block", make(1, 2, BLOCK, 8)),
            Case("one query more than a block", make(1, 2, BLOCK + 1, 8)),
            Case("SigLIP", make(1, 3, 196, 64)),
            Case("several blocks", make(2, 1, 3 * BLOCK + 17, 6)),
        ]

    @staticmethod
    def raw_args(args: list[Any], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        q, k = args
        return q, k, kwargs.get("scale", q.shape[3] ** -0.5)


def by_loops(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """The definition, a query at a time."""
    batch, heads, rows, _ = q.shape
    scores = torch.zeros(batch, k.shape[2], dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            for m in range(rows):
                weights = [float((q[b, h, m] * k[b, h, n]).sum()) * scale for n in range(k.shape[2])]
                scores[b] += torch.tensor(weights, dtype=torch.float64).softmax(0) / (heads * rows)
    return scores


def test_definition(device: torch.device) -> None:
    q, k = (t.to(device) for t in make(2, 3, 6, 4, queries=5))
    for scale in (None, 0.8):
        expected = by_loops(q.cpu(), k.cpu(), 0.5 if scale is None else scale)
        for function in (ops.mean_attention, ops.reference.mean_attention):
            scores = function(q, k, scale)
            torch.testing.assert_close(scores.cpu(), expected, rtol=1e-14, atol=1e-15)
            torch.testing.assert_close(scores.sum(1).cpu(), torch.ones(2, dtype=torch.float64))


@random_examples(40)
@given(
    batch=st.integers(0, 3),
    heads=st.integers(1, 4),
    tokens=st.integers(1, 300),
    queries=st.integers(1, 300),
    channels=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_random_shapes(
    device: torch.device,
    batch: int,
    heads: int,
    tokens: int,
    queries: int,
    channels: int,
    dtype: torch.dtype,
    seed: int,
) -> None:
    q, k = (t.to(device, dtype) for t in make(batch, heads, tokens, channels, queries, seed))
    scores = ops.mean_attention(q, k)
    assert_near(scores, ops.reference.mean_attention(q.double(), k.double()))
    assert scores.shape == (batch, tokens)


class _Largest(TorchDispatchMode):
    """The most elements that any result of an operator has."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("kernels", [True, False])
def test_no_attention_map_is_formed(
    device: torch.device, kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not kernels:
        monkeypatch.setattr(library, "KERNEL_DEVICES", frozenset())
    heads, tokens, channels = 2, 5 * BLOCK, 4
    q, k = (t.to(device).requires_grad_() for t in make(1, heads, tokens, channels))
    with _Largest() as forward:
        scores = ops.mean_attention(q, k)
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        ops.mean_attention(q, k)
    with _Largest() as backward:
        scores.square().sum().backward()
    if device.type in library.KERNEL_DEVICES:
        assert forward.elements == tokens and backward.elements == q.numel()
    else:
        assert forward.elements == backward.elements == heads * BLOCK * tokens
    assert saved == [q.numel(), k.numel()]
    with _Largest() as reference:
        ops.reference.mean_attention(q, k)
    assert reference.elements == heads * tokens * tokens


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_blocks_of_queries_where_no_kernel_is(
    device: torch.device, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "KERNEL_DEVICES", frozenset())
    for queries in (3, BLOCK, BLOCK + 1, 3 * BLOCK + 17):
        args = [t.to(device, dtype) for t in make(2, 2, 40, 8, queries)]
        wide = [t.double() for t in args]
        results = [
            f(*differentiable(t))
            for f, t in ((ops.mean_attention, args), (ops.reference.mean_attention, wide))
        ]
        assert_near(*results)
        weights = torch.randn(2, 40, dtype=torch.float64, device=device).to(dtype)
        grads = [torch.autograd.grad(r, t, weights.to(r)) for r, t in zip(results, (args, wide), strict=True)]
        for actual, expected in zip(*grads, strict=True):
            assert_near(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_large_products(device: torch.device, dtype: torch.dtype) -> None:
    """Products beyond float16's largest, 65504, which scaled_dot_product_attention bears."""
    q = torch.full((1, 1, 2, 64), 40.0, device=device, dtype=dtype)
    k = torch.cat([q[:, :, :1], q[:, :, :1] * 0.999], dim=2)
    scores = ops.mean_attention(q, k)
    assert_near(scores, ops.reference.mean_attention(q.double(), k.double()))


def test_extreme_logits(device: torch.device) -> None:
    inf, nan = float("inf"), float("nan")
    rows = [[1e4, -1e4, 0.0], [0.0, -inf, 0.0], [0.0, nan, 1.0], [inf, 0.0, 1.0]]
    k = torch.tensor(rows, device=device).reshape(4, 1, 3, 1)
    scores = ops.mean_attention(torch.ones(4, 1, 1, 1, device=device), k, 1.0)
    expected = k[:, 0, :, 0].double().softmax(-1)
    torch.testing.assert_close(scores.double(), expected, rtol=1e-6, atol=1e-30, equal_nan=True)


def test_reads_a_packed_qkv(device: torch.device) -> None:
    qkv = torch.randn(2, 19, 3 * 3 * 8, dtype=torch.float64).to(device)
    q, k, _ = qkv.view(2, 19, 3, 3, 8).permute(2, 0, 3, 1, 4).unbind(0)
    attention = (q @ k.transpose(-2, -1) * 8**-0.5).softmax(-1)
    torch.testing.assert_close(ops.mean_attention(q, k), attention.mean((1, 2)))


def test_autocast_casts_as_attention_does(device: torch.device) -> None:
    q, k = (t.float().to(device).requires_grad_() for t in make(1, 2, BLOCK + 9, 8))
    with torch.autocast(device.type, dtype=torch.bfloat16):
        mixed = ops.mean_attention(q, k.bfloat16())
        assert torch.equal(mixed, ops.mean_attention(q, k))
        assert mixed.dtype == torch.float32
        # A backward under autocast computes the same as one outside.
        inside = torch.autograd.grad(mixed.square().sum(), (q, k), retain_graph=True)
    outside = torch.autograd.grad(mixed.square().sum(), (q, k))
    assert torch.equal(mixed, ops.mean_attention(q.bfloat16(), k.bfloat16()))
    for a, b in zip(inside, outside, strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b)


def test_needs_one_gradient_only(device: torch.device) -> None:
    q, k = (t.to(device) for t in make(1, 2, 7, 4))
    both = [t.clone().requires_grad_() for t in (q, k)]
    grads = torch.autograd.grad(ops.mean_attention(*both).square().sum(), both)
    for i in range(2):
        args = [q.clone(), k.clone()]
        args[i].requires_grad_()
        (grad,) = torch.autograd.grad(ops.mean_attention(*args).square().sum(), args[i])
        assert torch.equal(grad, grads[i])


def test_function_transforms_and_second_derivatives(device: torch.device) -> None:
    q, k = (t.to(device) for t in make(3, 2, 7, 4))
    expected = ops.mean_attention(q, k)
    mapped = torch.func.vmap(lambda q, k: ops.mean_attention(q[None], k[None])[0])(q, k)
    torch.testing.assert_close(mapped, expected)
    grad = torch.func.grad(lambda q: ops.mean_attention(q, k).square().sum())(q)
    leaf = q.clone().requires_grad_()
    (own,) = torch.autograd.grad(ops.mean_attention(leaf, k).square().sum(), leaf, create_graph=True)
    torch.testing.assert_close(grad, own)
    kernels = device.type in library.KERNEL_DEVICES
    match = "mean_attention is differentiable once" if kernels else "once_differentiable"
    with pytest.raises(RuntimeError, match=match):
        own.sum().backward()


def test_errors(device: torch.device) -> None:
    q, k = (t.float().to(device) for t in make(2, 3, 7, 5))
    for function in (ops.mean_attention, ops.reference.mean_attention):
        with pytest.raises(TypeError, match=r"q must be a tensor of shape \[B, H, M, D\], got list"):
            function([1.0], k)
        with pytest.raises(ValueError, match=r"q must have shape \[B, H, M, D\], got \(2, 3, 5\)"):
            function(q[:, :, 0], k)
        with pytest.raises(ValueError, match=r"k must have shape \[B, H, N, D\], got \(6, 7, 5\)"):
            function(q, k.flatten(0, 1))
        for other in (k[:1], k[:, :2], k[..., :4]):
            with pytest.raises(ValueError, match=r"must agree in B, H and D, got \(2, 3, 7, 5\) and \("):
                function(q, other)
        with pytest.raises(TypeError, match="one dtype, got torch.float32 and torch.bfloat16"):
            function(q, k.bfloat16())
        with pytest.raises(TypeError, match="must be float32, float16, bfloat16 or float64, got torch.int64"):
            function(q.long(), k.long())
        with pytest.raises(TypeError, match="scale must be a float or None, got str"):
            function(q, k, "1")
        with pytest.raises(ValueError, match="k must have at least one head, token and channel"):
            function(q, k[:, :, :0])
        with pytest.raises(ValueError, match="q must have at least one head, token and channel"):
            function(q[:, :, :0], k)
        with pytest.raises(ValueError, match="on one device"):
            function(q, k.to("meta"))


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 16, 17, 31, 33, 64, 97, 197])
def test_sizes(device: torch.device, dtype: torch.dtype, tokens: int) -> None:
    for channels in (1, 8, 33, 64):
        for queries in (1, tokens, 100):
            q, k = (t.to(device, dtype) for t in make(2, 2, tokens, channels, queries))
            assert_near(ops.mean_attention(q, k), ops.reference.mean_attention(q.double(), k.double()))


@torch.no_grad()
def test_bit_identical_whatever_the_batch_and_the_place(device: torch.device) -> None:
    qkv = torch.randn(3, 197, 3 * 2 * 64, generator=torch.Generator().manual_seed(1)).to(device)
    q, k, _ = ops.reference.unpacked(qkv, 2)
    scores = ops.mean_attention(q, k)
    alone = torch.cat([ops.mean_attention(q[i : i + 1].contiguous(), k[i : i + 1].clone()) for i in range(3)])
    assert torch.equal(scores, alone)
    # Some queries alone are those of a slice.
    expected = (q[:, :, 5:60].double() @ k.double().transpose(2, 3) / 8).softmax(-1).mean((1, 2))
    assert_near(ops.mean_attention(q[:, :, 5:60], k), expected)


def test_operator_refuses_what_the_function_would() -> None:
    q, k = (t.float() for t in make(2, 3, 7, 5))
    for bad, match in (
        ((q[:1], k), "must agree in B, H and D"),
        ((q[..., :4], k), "must agree in B, H and D"),
        ((q[:, :, :0], k), "at least one head, token and channel"),
        ((q, k[:, :, :0]), "at least one head, token and channel"),
        ((q[0], k), "q must have shape"),
        ((q, k.double()), "dtype"),
        ((q.long(), k.long()), "expected float32, float16, bfloat16 or float64"),
    ):
        with pytest.raises(RuntimeError, match=match):
            torch.ops.evit.mean_attention(*bad, 1.0)
        with pytest.raises(RuntimeError, match=match):
            torch.ops.evit.mean_attention_backward(torch.ones(2, 7), *bad, 1.0)
    for grad in (torch.ones(2, 6), torch.ones(1, 7), torch.ones(7)):
        with pytest.raises(RuntimeError, match="grad_scores must have shape"):
            torch.ops.evit.mean_attention_backward(grad, q, k, 1.0)


def test_memory_is_linear_in_tokens(pytestconfig: pytest.Config) -> None:
    if pytestconfig.getoption("--cuda-on-host"):
        pytest.skip("400 million probabilities take the CPU hours as CUDA threads")
    # 20,000 tokens: a map of N x N would be 1.6 GB.
    import resource

    q, k = (torch.randn(1, 1, 20_000, 8, dtype=torch.bfloat16).requires_grad_() for _ in range(2))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    torch.autograd.grad(ops.mean_attention(q, k).square().sum(), (q, k))
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 100e6


def test_flop_counter() -> None:
    q, k = (t.requires_grad_() for t in make(2, 3, 7, 8, queries=5))
    product = 2 * 2 * 3 * 5 * 7 * 8
    with FlopCounterMode(display=False) as counter:
        scores = ops.mean_attention(q, k)
    assert counter.get_total_flops() == product
    with FlopCounterMode(display=False) as counter:
        scores.square().sum().backward()
    assert counter.get_total_flops() == 3 * product
