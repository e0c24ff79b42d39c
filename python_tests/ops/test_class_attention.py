"""Tests of evit_ext.ops.class_attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_tester import DTYPES, Case, OperatorTester, assert_near
from torch import Tensor

from evit_ext import ops


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


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(0, 4),
    heads=st.integers(1, 5),
    tokens=st.integers(1, 70),
    channels=st.integers(1, 70),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_random_shapes(
    batch: int, heads: int, tokens: int, channels: int, dtype: torch.dtype, seed: int
) -> None:
    q, k = (t.to(dtype) for t in make(batch, heads, tokens, channels, seed))
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


def test_operator_refuses_what_the_function_would(device: torch.device) -> None:
    # torch.ops.evit.* can be called directly: it must not read out of bounds either.
    q, k = (t.float().to(device) for t in make(2, 3, 7, 5))
    for bad_q, bad_k in ((q[:1], k), (q[:, :2], k), (q[..., :3], k), (q, k.double()), (q[0], k)):
        with pytest.raises(RuntimeError):
            torch.ops.evit.class_attention(bad_q, bad_k, 1.0)
    with pytest.raises(RuntimeError, match="grad_scores"):
        torch.ops.evit.class_attention_backward(torch.ones(2, 6, device=device), q, k, 1.0)
