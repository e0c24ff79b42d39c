"""Tests of evit_ext.ops.class_attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from operator_tester import DTYPES, Case, OperatorTester, assert_near, random_examples
from torch import Tensor

from evit_ext import ops

INF, NAN = float("inf"), float("nan")


def make(batch: int, heads: int, tokens: int, channels: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, heads, channels, dtype=torch.float64, generator=generator)
    k = torch.randn(batch, heads, tokens, channels, dtype=torch.float64, generator=generator)
    return q, k


class TestClassAttention(OperatorTester):
    operator = staticmethod(ops.class_attention)
    reference = staticmethod(ops.reference.class_attention)
    qualified_name = "class_attention"
    scores_like = True
    # The gradients of the logits add up to 0, so that terms of size 1 cancel in that of q. The largest error
    # seen is 1.1 times TOLERANCE in float32 and 2.6 times in float64, where the CUDA kernels sum.
    gradient_slack = 4

    @staticmethod
    def cases() -> list[Case]:
        return [
            Case("small", make(2, 3, 7, 5)),
            Case("one token", make(1, 1, 1, 1)),
            Case("scale", make(2, 2, 17, 16), {"scale": 0.37}),
            Case("negative scale", make(1, 2, 5, 3), {"scale": -2.0}),
            Case("DeiT-S", make(2, 6, 197, 64)),
            Case("odd", make(3, 2, 129, 33)),
            Case("long", make(1, 2, 1134, 80)),
        ]

    @staticmethod
    def raw_args(args: list[Any], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        q, k = args
        return q, k, kwargs.get("scale", q.shape[2] ** -0.5)


def logsumexp_of(q: Tensor, k: Tensor, scale: float | None) -> Tensor:
    """What an attention kernel would leave: [B, H], exact but for one rounding, without a gradient."""
    q, k = q.detach().double().contiguous(), k.detach().double().contiguous()
    logits = (q.unsqueeze(2) * k).sum(-1) * (q.shape[2] ** -0.5 if scale is None else scale)
    return logits.logsumexp(-1)


def with_logsumexp(q: Tensor, k: Tensor, scale: float | None = None) -> Tensor:
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return ops.class_attention(q, k, scale, logsumexp_of(q, k, scale).to(dtype))


class TestClassAttentionWithLogsumexp(TestClassAttention):
    """The same results and gradients where the sum is given."""

    operator = staticmethod(with_logsumexp)

    @staticmethod
    def raw_args(args: list[Any], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        q, k, scale = TestClassAttention.raw_args(args, kwargs)
        return q, k, scale, logsumexp_of(q, k, scale).float()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reference_takes_logsumexp(device: torch.device, dtype: torch.dtype) -> None:
    q, k = (t.to(device, dtype).requires_grad_() for t in make(2, 3, 19, 8))
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    logsumexp = logsumexp_of(q, k, 0.4).to(accumulate)
    scores = ops.reference.class_attention(q, k, 0.4, logsumexp)
    exact_q, exact_k = (t.detach().double().requires_grad_() for t in (q, k))
    expected = ops.reference.class_attention(exact_q, exact_k, 0.4)
    assert scores.dtype == accumulate
    assert_near(scores, expected)
    weight = torch.randn_like(expected)
    grads = torch.autograd.grad(scores, (q, k), weight.to(accumulate))
    for actual, wanted in zip(grads, torch.autograd.grad(expected, (exact_q, exact_k), weight), strict=True):
        assert_near(actual, wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logsumexp_is_read_with_any_strides_and_trusted(device: torch.device, dtype: torch.dtype) -> None:
    q, k = (t.to(device, dtype) for t in make(3, 4, 11, 6))
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    # Not what belongs to q and k, so that every element tells on the result; different in every head.
    logsumexp = torch.arange(12, dtype=accumulate, device=device).reshape(3, 4) / 3
    logits = torch.einsum("bhd,bhnd->bhn", q.double(), k.double()) * 0.5
    expected = (logits - logsumexp.double().unsqueeze(-1)).exp().mean(1)
    for function in (ops.class_attention, ops.reference.class_attention):
        contiguous = function(q, k, 0.5, logsumexp)
        assert_near(contiguous, expected)
        assert torch.equal(function(q, k, 0.5, logsumexp.t().contiguous().t()), contiguous)
        assert torch.equal(function(q, k, 0.5, logsumexp.repeat(1, 2)[:, :4]), contiguous)
        alike = function(q, k, 0.5, logsumexp[:, :1].expand(3, 4))
        assert torch.equal(alike, function(q, k, 0.5, logsumexp[:, :1].repeat(1, 4)))


def test_nan_and_inf_with_logsumexp(device: torch.device) -> None:
    q, k = torch.ones(1, 2, 1, device=device), torch.zeros(1, 2, 3, 1, device=device)
    for function in (ops.class_attention, ops.reference.class_attention):
        one_head = torch.tensor([[1.0, NAN]], device=device)
        assert function(q, k, 1.0, one_head).isnan().all()
        assert function(q, k, 1.0, torch.full_like(one_head, INF)).eq(0).all()
        assert function(q, k, 1.0, torch.full_like(one_head, -INF)).eq(INF).all()
        assert function(q, k, 1.0, torch.full_like(one_head, -1e4)).eq(INF).all()
        bad = k.clone()
        bad[0, 1, 2] = NAN
        scores = function(q, bad, 1.0, torch.zeros_like(one_head))
        assert scores[0, 2].isnan() and scores[0, :2].eq(1).all()
        own = bad.squeeze(-1).logsumexp(-1)
        assert function(q, bad, 1.0, own).isnan().all()


def test_no_gradient_is_lost_in_logsumexp(device: torch.device) -> None:
    # As it comes from torch.logsumexp, with a graph of its own: nothing is counted twice.
    q, k = (t.to(device).requires_grad_() for t in make(2, 3, 7, 5))
    weight = torch.randn(2, 7, dtype=torch.float64, device=device)
    expected = torch.autograd.grad(ops.class_attention(q, k, 1.0), (q, k), weight)
    for function in (ops.class_attention, ops.reference.class_attention):
        own = torch.einsum("bhd,bhnd->bhn", q, k).logsumexp(-1)
        assert own.requires_grad
        grads = torch.autograd.grad(function(q, k, 1.0, own), (q, k, own), weight, allow_unused=True)
        assert grads[2] is None
        for a, b in zip(grads, expected, strict=False):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reads_a_packed_qkv(device: torch.device, dtype: torch.dtype) -> None:
    batch, tokens, heads, channels = 2, 19, 3, 24
    qkv = torch.randn(batch, tokens, 3 * heads * channels, dtype=torch.float64).to(device, dtype)
    q, k, _ = qkv.view(batch, tokens, 3, heads, channels).permute(2, 0, 3, 1, 4).unbind(0)
    scores = ops.class_attention(q[:, :, 0], k)
    attention = (q.double() @ k.double().transpose(-2, -1) * channels**-0.5).softmax(-1)
    assert_near(scores, attention[:, :, 0].mean(1))


def test_scale_reaches_the_kernel(device: torch.device) -> None:
    # A scalar of the wrong C++ type would arrive as 0, that is, as uniform attention.
    q, k = (t.to(device) for t in make(1, 1, 4, 2))
    expected = ((q.unsqueeze(2) * k).sum(-1) * 1.2345678901234567).softmax(-1).mean(1)
    torch.testing.assert_close(ops.class_attention(q, k, 1.2345678901234567), expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_extreme_logits(device: torch.device, dtype: torch.dtype) -> None:
    q = torch.tensor([[[1.0]], [[1.0]], [[1.0]], [[1.0]]], device=device, dtype=dtype)
    inf, nan = float("inf"), float("nan")
    rows = [[[1e4, -1e4, 0.0]], [[0.0, -inf, 0.0]], [[0.0, nan, 1.0]], [[inf, 0.0, 1.0]]]
    k = torch.tensor(rows, device=device, dtype=dtype).unsqueeze(-1)
    scores = ops.class_attention(q, k, 1.0)
    expected = k[:, 0, :, 0].double().softmax(-1)
    torch.testing.assert_close(scores.double(), expected, rtol=1e-6, atol=1e-30, equal_nan=True)
    assert scores[2].isnan().all() and scores[3].isnan().all()


def test_small_probabilities_are_not_flushed(device: torch.device) -> None:
    # The exponential must not lose what float32 can hold: e^-86 is normal, e^-100 subnormal.
    k = torch.tensor([0.0, -20.0, -50.0, -86.0, -100.0], device=device).reshape(1, 1, 5, 1)
    scores = ops.class_attention(torch.ones(1, 1, 1, device=device), k, 1.0)
    expected = k.flatten().double().softmax(0)
    assert ((scores[0].double() - expected).abs() <= 1e-6 * expected + 1.5e-45).all()


@random_examples(60)
@given(
    batch=st.integers(0, 4),
    heads=st.integers(1, 5),
    tokens=st.integers(1, 70),
    channels=st.integers(1, 70),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_random_shapes(
    device: torch.device, batch: int, heads: int, tokens: int, channels: int, dtype: torch.dtype, seed: int
) -> None:
    q, k = (t.to(device, dtype) for t in make(batch, heads, tokens, channels, seed))
    scores = ops.class_attention(q, k)
    assert_near(scores, ops.reference.class_attention(q.double(), k.double()))
    assert scores.shape == (batch, tokens)


def test_autocast_casts_as_attention_does(device: torch.device) -> None:
    q, k = (t.float().to(device) for t in make(1, 2, 9, 8))
    with torch.autocast(device.type, dtype=torch.bfloat16):
        mixed = ops.class_attention(q, k.bfloat16())
        assert torch.equal(mixed, ops.class_attention(q, k))
    assert torch.equal(mixed, ops.class_attention(q.bfloat16(), k.bfloat16()))


def test_errors(device: torch.device) -> None:
    q, k = (t.float().to(device) for t in make(2, 3, 7, 5))
    for function in (ops.class_attention, ops.reference.class_attention):
        with pytest.raises(TypeError, match="q must be a tensor of shape.*got list"):
            function([1.0], k)
        with pytest.raises(ValueError, match=r"q must have shape \[B, H, D\], got \(2, 15\)"):
            function(q.flatten(1), k)
        with pytest.raises(ValueError, match=r"must agree in B, H and D, got \(2, 3, 5\) and \(2, 3, 7, 4\)"):
            function(q, k[..., :4])
        with pytest.raises(TypeError, match="one dtype, got torch.float32 and torch.bfloat16"):
            function(q, k.bfloat16())
        with pytest.raises(TypeError, match="must be float32, float16, bfloat16 or float64, got torch.int64"):
            function(q.long(), k.long())
        with pytest.raises(TypeError, match="scale must be a float or None, got str"):
            function(q, k, "1")
        with pytest.raises(ValueError, match="at least one head, token and channel"):
            function(q, k[:, :, :0])
        with pytest.raises(ValueError, match="on one device"):
            function(q, k.to("meta"))
        good = torch.zeros(2, 3, device=device)
        with pytest.raises(TypeError, match=r"logsumexp must be a tensor of shape \[B, H\], got float"):
            function(q, k, None, 1.0)
        with pytest.raises(ValueError, match=r"logsumexp must have shape \[B, H\], got \(2, 3, 1\)"):
            function(q, k, None, good.unsqueeze(-1))
        with pytest.raises(ValueError, match=r"logsumexp must have shape \[B, H\] = \(2, 3\), got \(3, 2\)"):
            function(q, k, None, good.t())
        with pytest.raises(ValueError, match="logsumexp and k must be on one device"):
            function(q, k, None, good.to("meta"))
        for dtype, other in ((torch.bfloat16, torch.bfloat16), (torch.float64, torch.float32)):
            with pytest.raises(TypeError, match=f"logsumexp must be torch.*for {dtype} keys, got {other}"):
                function(q.to(dtype), k.to(dtype), None, good.to(other))


def test_operator_refuses_what_the_function_would(device: torch.device) -> None:
    # torch.ops.evit.* can be called directly: it must not read out of bounds either.
    q, k = (t.float().to(device) for t in make(2, 3, 7, 5))
    for bad_q, bad_k in ((q[:1], k), (q[:, :2], k), (q[..., :3], k), (q, k.double()), (q[0], k)):
        with pytest.raises(RuntimeError):
            torch.ops.evit.class_attention(bad_q, bad_k, 1.0)
    for bad in (torch.zeros(3, 2), torch.zeros(2, 2), torch.zeros(6), torch.zeros(2, 3, dtype=torch.float64)):
        with pytest.raises(RuntimeError, match="logsumexp must"):
            torch.ops.evit.class_attention(q, k, 1.0, bad.to(device))
    with pytest.raises(RuntimeError, match="grad_scores"):
        torch.ops.evit.class_attention_backward(torch.ones(2, 6, device=device), q, k, 1.0)
