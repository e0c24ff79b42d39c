"""Tests of evit_ext.ops.merge_tokens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from operator_tester import DTYPES, Case, OperatorTester, assert_near, random_examples
from torch import Tensor

from evit_ext import ops


def make(
    batch: int, tokens: int, channels: int, out: int, prefix: int, seed: int = 0
) -> tuple[Tensor, Tensor, int, Tensor, int]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, tokens, channels, dtype=torch.float64, generator=generator)
    owner = torch.randint(0, max(out, 1), (batch, tokens - prefix), generator=generator)
    weights = torch.randint(1, 6, (batch, tokens - prefix), generator=generator).double()
    return x, owner, out, weights, prefix


class TestMergeTokens(OperatorTester):
    operator = staticmethod(ops.merge_tokens)
    reference = staticmethod(ops.reference.merge_tokens)
    qualified_name = "merge_tokens"
    scores = (1,)

    @staticmethod
    def cases() -> list[Case]:
        x = torch.randn(1, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        fractions = torch.tensor([[0.5, 2.25, 1.75, 0.125]], dtype=torch.float64)
        return [
            Case("several", make(2, 12, 5, 4, 1)),
            Case("owners of none", make(2, 6, 5, 9, 2)),
            Case("one row, one channel", make(1, 1, 1, 1, 0)),
            Case("nothing but prefix tokens", make(2, 3, 4, 2, 3)),
            Case("no channels", make(2, 4, 0, 2, 1)),
            Case("fractions", (x, torch.tensor([[1, 0, 1, 1]]), 2, fractions, 1)),
            Case("DeiT-S", make(2, 197, 384, 183, 1)),
            Case("all to one", make(1, 129, 33, 1, 1)),
        ]

    @staticmethod
    def raw_args(args: list, kwargs: dict) -> tuple:  # type: ignore[type-arg]
        x, owner, out, weights, prefix = args
        return x, owner, weights, out, prefix


@pytest.mark.parametrize("x_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weights_dtype", DTYPES, ids=str)
def test_weights_may_have_another_dtype(
    device: torch.device, x_dtype: torch.dtype, weights_dtype: torch.dtype
) -> None:
    x, owner, out, weights, prefix = make(2, 9, 20, 3, 1)
    x = x.to(device, x_dtype).requires_grad_()
    weights = weights.to(device, weights_dtype).requires_grad_()
    merged, totals = ops.merge_tokens(x, owner.to(device), out, weights, prefix)
    expected, sums = ops.reference.merge_tokens(x.double(), owner.to(device), out, weights.double(), prefix)
    assert_near(merged, expected)
    assert torch.equal(totals.double(), sums)  # whole numbers
    (merged.sum() + totals.sum()).backward()
    assert x.grad is not None and x.grad.dtype == x_dtype
    assert weights.grad is not None and weights.grad.dtype == weights_dtype


@random_examples(60)
@given(
    batch=st.integers(0, 4),
    patches=st.integers(0, 40),
    prefix=st.integers(0, 3),
    channels=st.integers(0, 140),
    out=st.integers(1, 50),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_random_shapes(
    device: torch.device,
    batch: int,
    patches: int,
    prefix: int,
    channels: int,
    out: int,
    dtype: torch.dtype,
    seed: int,
) -> None:
    x, owner, _, weights, _ = make(batch, prefix + patches, channels, out, prefix, seed)
    x = x.to(dtype)
    expected = torch.zeros(batch, prefix + out, channels, dtype=torch.float64)
    expected[:, :prefix] = x[:, :prefix]
    for b in range(batch):
        for m in range(out):
            of_m = (owner[b] == m).nonzero()[:, 0]
            if len(of_m):
                shares = weights[b, of_m] / weights[b, of_m].sum()
                expected[b, prefix + m] = (shares.unsqueeze(1) * x[b, prefix + of_m].double()).sum(dim=0)
    merged, _ = ops.merge_tokens(x.to(device), owner.to(device), out, weights.to(device), prefix)
    assert_near(merged.cpu(), expected)


def test_each_counts_once_without_weights(device: torch.device) -> None:
    x, owner, out, _, prefix = make(2, 12, 5, 4, 1)
    x, owner = x.to(device), owner.to(device)
    merged, totals = ops.merge_tokens(x, owner, out)
    ones = torch.ones(owner.shape, dtype=torch.float64, device=device)
    expected, sums = ops.merge_tokens(x, owner, out, ones, prefix)
    assert torch.equal(merged, expected) and torch.equal(totals, sums)
    assert totals.sum().item() == owner.numel()


def test_one_that_is_alone_stays_as_it_is(device: torch.device) -> None:
    x = torch.tensor([[[3.0], [float("inf")], [0.1]]], device=device, requires_grad=True)
    weights = torch.tensor([[0.0, float("nan"), 3.0]], device=device, requires_grad=True)
    owner = torch.tensor([[2, 0, 1]], device=device)
    for function in (ops.merge_tokens, ops.reference.merge_tokens):
        merged, totals = function(x, owner, 3, weights, 0)
        assert torch.equal(merged, x[:, [1, 2, 0]])
        of_x, of_weights = torch.autograd.grad(
            (merged * torch.tensor([5.0, 6, 7], device=device).view(1, 3, 1)).sum() + totals[0, 1],
            [x, weights],
        )
        assert of_x.flatten().tolist() == [7, 5, 6]
        assert of_weights.tolist() == [[0, 0, 1]]


def test_rounds_once(device: torch.device) -> None:
    # 256 + 1 is 256 in bfloat16: added one by one in bfloat16 the ones would be lost.
    x = torch.tensor([256.0] + [1.0] * 64, device=device).bfloat16().reshape(1, 65, 1)
    merged, totals = ops.merge_tokens(x, torch.zeros(1, 65, dtype=torch.int64, device=device), 1, None, 0)
    assert merged.item() == torch.tensor(320 / 65).bfloat16().item()
    assert totals.item() == 65


def test_second_derivatives_are_refused(device: torch.device) -> None:
    x, owner, out, weights, prefix = make(1, 6, 3, 2, 1)
    x = x.to(device).requires_grad_()
    merged, _ = ops.merge_tokens(x, owner.to(device), out, weights.to(device), prefix)
    (first,) = torch.autograd.grad(merged.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="merge_tokens is differentiable once"):
        first.sum().backward()


def test_errors(device: torch.device) -> None:
    x, owner, out, weights, _ = make(2, 7, 5, 3, 1)
    x, owner, weights = x.to(device), owner.to(device), weights.to(device)
    for function in (ops.merge_tokens, ops.reference.merge_tokens):
        with pytest.raises(ValueError, match=r"owner must have shape .* = \(2, 7\), got \(2, 6\)"):
            function(x, owner, out, weights, 0)
        with pytest.raises(ValueError, match=r"weights must have shape .* = \(2, 6\), got \(2, 3\)"):
            function(x, owner, out, weights[:, :3])
        with pytest.raises(ValueError, match=r"owner must have shape .* = \(2, 6\), got \(1, 6\)"):
            function(x, owner[:1], out, weights)
        with pytest.raises(TypeError, match="owner must be int64, got torch.int32"):
            function(x, owner.int(), out, weights)
        with pytest.raises(TypeError, match="weights must be float32.*got torch.int64"):
            function(x, owner, out, weights.long())
        with pytest.raises(ValueError, match="num_out must not be negative, got -1"):
            function(x, owner, -1, weights)
        with pytest.raises(ValueError, match="num_out must be at least 1 for 6 patches, got 0"):
            function(x, owner, 0, weights)
        with pytest.raises(TypeError, match="num_out must be an int, got float"):
            function(x, owner, 3.0, weights)
        with pytest.raises(ValueError, match=r"num_prefix_tokens must be in \[0, 7\], got 8"):
            function(x, owner, out, weights, 8)
        with pytest.raises(ValueError, match="weights and x must be on one device"):
            function(x, owner, out, weights.to("meta"))
    if device.type == "cpu":
        for function in (ops.merge_tokens, ops.reference.merge_tokens):
            with pytest.raises(IndexError, match=r"owner must be in \[0, 3\), got 3"):
                function(x, torch.full_like(owner, 3), 3, weights)
        raw = torch.ops.evit
        with pytest.raises(RuntimeError, match=r"owner must be in \[0, 3\), got -2"):
            raw.merge_tokens(x, torch.full_like(owner, -2), weights, 3, 1)
        with pytest.raises(RuntimeError, match="weights must have shape"):
            raw.merge_tokens(x, owner, weights[:, :3].contiguous(), 3, 1)
        with pytest.raises(RuntimeError, match="num_out must be at least 1"):
            raw.merge_tokens(x, owner, weights, 0, 1)
        with pytest.raises(RuntimeError, match="num_prefix_tokens must be in"):
            raw.merge_tokens(x, owner, weights, 3, -1)
        totals = weights[:, :3].contiguous()
        with pytest.raises(RuntimeError, match="grad_out must have shape"):
            raw.merge_tokens_backward(x[:1, :4].contiguous(), totals, x, owner, weights, 1)
        with pytest.raises(RuntimeError, match="grad_totals must have shape"):
            raw.merge_tokens_backward(x[:, :4].contiguous(), weights, x, owner, weights, 1)
