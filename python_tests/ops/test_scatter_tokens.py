"""Tests of evit_ext.ops.scatter_tokens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from operator_tester import DTYPES, Case, OperatorTester, assert_near, random_examples
from torch import Tensor

from evit_ext import ops


def make(batch: int, indices: int, channels: int, tokens: int, seed: int = 0) -> tuple[Tensor, Tensor, int]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, indices, channels, dtype=torch.float64, generator=generator)
    return x, torch.randint(0, max(tokens, 1), (batch, indices), generator=generator), tokens


class TestScatterTokens(OperatorTester):
    operator = staticmethod(ops.scatter_tokens)
    reference = staticmethod(ops.reference.scatter_tokens)
    qualified_name = "scatter_tokens"

    @staticmethod
    def cases() -> list[Case]:
        x, _, _ = make(1, 4, 3, 1)
        return [
            Case("repeated", make(2, 11, 5, 7)),
            Case("first and last", (x, torch.tensor([[5, 0, 0, 5]]), 6)),
            Case("one row, one channel", make(1, 1, 1, 1)),
            Case("nothing to scatter", make(2, 0, 4, 3)),
            Case("no channels", make(2, 2, 0, 3)),
            Case("DeiT-S", make(2, 138, 384, 197)),
            Case("all to one place", (make(1, 129, 33, 1)[0], torch.full((1, 129), 2), 4)),
        ]


@random_examples(60)
@given(
    batch=st.integers(0, 4),
    indices=st.integers(0, 50),
    channels=st.integers(0, 70),
    tokens=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_random_shapes(
    device: torch.device, batch: int, indices: int, channels: int, tokens: int, dtype: torch.dtype, seed: int
) -> None:
    x, index, _ = make(batch, indices, channels, tokens, seed)
    x = x.to(dtype)
    expected = torch.zeros(batch, tokens, channels, dtype=torch.float64)
    for b in range(batch):
        for i in range(indices):
            expected[b, index[b, i]] += x[b, i].double()
    assert_near(ops.scatter_tokens(x.to(device), index.to(device), tokens).cpu(), expected)


def test_rounds_once(device: torch.device) -> None:
    # 256 + 1 is 256 in bfloat16: added one by one in bfloat16 the ones would be lost.
    x = torch.tensor([256.0] + [1.0] * 64, device=device).bfloat16().reshape(1, 65, 1)
    out = ops.scatter_tokens(x, torch.zeros(1, 65, dtype=torch.int64, device=device), 1)
    assert out.item() == 320.0


def test_num_tokens_reaches_the_kernel(device: torch.device) -> None:
    x, index, _ = make(1, 2, 3, 2)
    assert ops.scatter_tokens(x.to(device), index.to(device), 1000003).shape == (1, 1000003, 3)


def test_double_backward(device: torch.device) -> None:
    x, index, tokens = make(2, 6, 3, 4)
    x, index = x.to(device), index.to(device)
    assert torch.autograd.gradgradcheck(lambda t: ops.scatter_tokens(t, index, tokens), [x.requires_grad_()])


def test_undoes_gather(device: torch.device) -> None:
    x = torch.randn(2, 9, 4, device=device)
    index = torch.stack([torch.randperm(9) for _ in range(2)]).to(device)
    assert torch.equal(ops.scatter_tokens(ops.gather_tokens(x, index), index, 9), x)


def test_errors(device: torch.device) -> None:
    x, index, _ = make(2, 3, 5, 7)
    x, index = x.to(device), index.to(device)
    for function in (ops.scatter_tokens, ops.reference.scatter_tokens):
        with pytest.raises(TypeError, match="num_tokens must be an int, got float"):
            function(x, index, 7.0)
        with pytest.raises(ValueError, match="num_tokens must not be negative, got -1"):
            function(x, index, -1)
        with pytest.raises(ValueError, match=r"must agree in K, got \(2, 3, 5\) and \(2, 2\)"):
            function(x, index[:, :2], 7)
        with pytest.raises(TypeError, match="index must be int64"):
            function(x, index.float(), 7)
    if device.type == "cpu":
        for function in (ops.scatter_tokens, ops.reference.scatter_tokens):
            with pytest.raises(IndexError, match=r"index must be in \[0, 3\), got 3"):
                function(x, torch.full_like(index, 3), 3)
        with pytest.raises(RuntimeError, match=r"index must be in \[0, 3\), got 9"):
            torch.ops.evit.scatter_tokens(x, torch.full_like(index, 9), 3)
        with pytest.raises(RuntimeError, match="must agree in K"):
            torch.ops.evit.scatter_tokens(x, index[:, :2].contiguous(), 7)
