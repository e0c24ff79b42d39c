"""Tests of evit_ext.ops.fuse_tokens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from operator_tester import DTYPES, Case, OperatorTester, assert_near, random_examples
from torch import Tensor

from evit_ext import ops


def make(
    batch: int, tokens: int, channels: int, indices: int, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, tokens, channels, dtype=torch.float64, generator=generator)
    weights = torch.rand(batch, tokens, dtype=torch.float64, generator=generator) / max(indices, 1)
    return x, weights, torch.randint(0, max(tokens, 1), (batch, indices), generator=generator)


class TestFuseTokens(OperatorTester):
    operator = staticmethod(ops.fuse_tokens)
    reference = staticmethod(ops.reference.fuse_tokens)
    qualified_name = "fuse_tokens"

    @staticmethod
    def cases() -> list[Case]:
        return [
            Case("repeated", make(2, 7, 5, 11)),
            Case("one row, one channel", make(1, 1, 1, 1)),
            Case("nothing to fuse", make(2, 3, 4, 0)),
            Case("no channels", make(2, 3, 0, 2)),
            Case("DeiT-S", make(2, 197, 384, 59)),
            Case("odd", make(3, 129, 33, 57)),
        ]


@pytest.mark.parametrize("x_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weights_dtype", DTYPES, ids=str)
def test_weights_may_have_another_dtype(
    device: torch.device, x_dtype: torch.dtype, weights_dtype: torch.dtype
) -> None:
    x, weights, index = (t.to(device) for t in make(2, 9, 20, 6))
    x, weights = x.to(x_dtype).requires_grad_(), weights.to(weights_dtype).requires_grad_()
    out = ops.fuse_tokens(x, weights, index)
    assert out.dtype == x_dtype
    # float64 weights of a float32 x are rounded to the type that the sum is formed in.
    coarser = torch.float32 if torch.float32 in (x_dtype, weights_dtype) else x_dtype
    expected = ops.reference.fuse_tokens(x.double(), weights.double(), index)
    assert_near(out, expected, coarser if x_dtype == torch.float64 else x_dtype)
    out.sum().backward()
    assert x.grad is not None and x.grad.dtype == x_dtype
    assert weights.grad is not None and weights.grad.dtype == weights_dtype


@random_examples(60)
@given(
    batch=st.integers(0, 4),
    tokens=st.integers(1, 40),
    channels=st.integers(0, 140),
    indices=st.integers(0, 50),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_random_shapes(
    device: torch.device, batch: int, tokens: int, channels: int, indices: int, dtype: torch.dtype, seed: int
) -> None:
    x, weights, index = make(batch, tokens, channels, indices, seed)
    x, weights = x.to(dtype), weights.to(dtype)
    expected = torch.zeros(batch, channels, dtype=torch.float64)
    for b in range(batch):
        for i in range(indices):
            n = index[b, i]
            expected[b] += weights[b, n].double() * x[b, n].double()
    assert_near(ops.fuse_tokens(x.to(device), weights.to(device), index.to(device)).cpu(), expected)


def test_only_named_tokens_count(device: torch.device) -> None:
    x = torch.tensor([[[float("inf")], [float("nan")], [3.0]]], device=device)
    weights = torch.tensor([[float("nan"), float("inf"), 2.0]], device=device)
    index = torch.tensor([[2]], device=device)
    x.requires_grad_()
    weights.requires_grad_()
    out = ops.fuse_tokens(x, weights, index)
    assert out.item() == 6.0
    (out * float("inf")).sum().backward()
    assert x.grad is not None and x.grad.flatten().tolist() == [0.0, 0.0, float("inf")]
    assert weights.grad is not None and weights.grad.flatten().tolist() == [0.0, 0.0, float("inf")]


def test_errors(device: torch.device) -> None:
    x, weights, index = (t.to(device) for t in make(2, 7, 5, 3))
    for function in (ops.fuse_tokens, ops.reference.fuse_tokens):
        with pytest.raises(
            ValueError, match=r"weights must have shape \[B, N\] of x = \(2, 7\).*got \(2, 3\)"
        ):
            function(x, weights[:, :3], index)
        with pytest.raises(TypeError, match="weights must be float32.*got torch.int64"):
            function(x, weights.long(), index)
        with pytest.raises(ValueError, match="weights and x must be on one device"):
            function(x, weights.to("meta"), index)
    if device.type == "cpu":
        with pytest.raises(IndexError, match=r"index must be in \[0, 7\), got -3"):
            ops.fuse_tokens(x, weights, torch.full_like(index, -3))
        with pytest.raises(RuntimeError, match=r"index must be in \[0, 7\), got 7"):
            torch.ops.evit.fuse_tokens(x, weights, torch.full_like(index, 7))
        with pytest.raises(RuntimeError, match="weights must have shape"):
            torch.ops.evit.fuse_tokens(x, weights[:, :3].contiguous(), index)
        with pytest.raises(RuntimeError, match="grad must have shape"):
            torch.ops.evit.fuse_tokens_backward(x[:, 0, :4].contiguous(), x, weights, index)
