"""Tests of evit_ext.ops.gather_tokens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from operator_tester import DTYPES, Case, OperatorTester, random_examples
from torch import Tensor

from evit_ext import ops


def make(batch: int, tokens: int, channels: int, indices: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, tokens, channels, dtype=torch.float64, generator=generator)
    return x, torch.randint(0, max(tokens, 1), (batch, indices), generator=generator)


class TestGatherTokens(OperatorTester):
    operator = staticmethod(ops.gather_tokens)
    reference = staticmethod(ops.reference.gather_tokens)
    qualified_name = "gather_tokens"

    @staticmethod
    def cases() -> list[Case]:
        x, _ = make(1, 6, 3, 0)
        return [
            Case("repeated", make(2, 7, 5, 11)),
            Case("first and last", (x, torch.tensor([[5, 0, 0, 5]]))),
            Case("one row, one channel", make(1, 1, 1, 1)),
            Case("none", make(2, 3, 4, 0)),
            Case("no channels", make(2, 3, 0, 2)),
            Case("DeiT-S", make(2, 197, 384, 138)),
            Case("odd", make(3, 129, 33, 57)),
        ]


@random_examples(60)
@given(
    batch=st.integers(0, 4),
    tokens=st.integers(1, 40),
    channels=st.integers(0, 70),
    indices=st.integers(0, 50),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_random_shapes(
    device: torch.device, batch: int, tokens: int, channels: int, indices: int, dtype: torch.dtype, seed: int
) -> None:
    x, index = make(batch, tokens, channels, indices, seed)
    x = x.to(dtype)
    expected = x.gather(1, index.unsqueeze(-1).expand(-1, -1, channels))
    assert torch.equal(ops.gather_tokens(x.to(device), index.to(device)).cpu(), expected)


def test_every_bit_is_copied(device: torch.device) -> None:
    x = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16).reshape(1, 256, 256).to(device)
    index = torch.arange(255, -1, -1, device=device).unsqueeze(0)
    result = ops.gather_tokens(x, index)
    assert torch.equal(result.view(torch.int16), x.flip(1).view(torch.int16))


def test_double_backward(device: torch.device) -> None:
    x, index = (t.to(device) for t in make(2, 4, 3, 6))
    assert torch.autograd.gradgradcheck(lambda t: ops.gather_tokens(t, index), [x.requires_grad_()])


def test_errors(device: torch.device) -> None:
    x, index = (t.to(device) for t in make(2, 7, 5, 3))
    for function in (ops.gather_tokens, ops.reference.gather_tokens):
        with pytest.raises(TypeError, match="index must be int64, got torch.int32"):
            function(x, index.int())
        with pytest.raises(ValueError, match=r"x must have shape \[B, N, C\], got \(7, 5\)"):
            function(x[0], index)
        with pytest.raises(ValueError, match=r"batch size of x, 2, got shape \(1, 3\)"):
            function(x, index[:1])
        with pytest.raises(TypeError, match="x must be float32.*got torch.complex64"):
            function(x.to(torch.complex64), index)
        with pytest.raises(ValueError, match="on one device"):
            function(x, index.to("meta"))
    if device.type == "cpu":
        for wrong in (-1, 7, 2**40):
            for function in (ops.gather_tokens, ops.reference.gather_tokens):
                with pytest.raises(IndexError, match=rf"index must be in \[0, 7\), got {wrong}"):
                    function(x, torch.full_like(index, wrong))
            # The kernel checks by itself: a compiled graph reaches it without the Python function's check.
            with pytest.raises(RuntimeError, match=rf"index must be in \[0, 7\), got {wrong}"):
                torch.ops.evit.gather_tokens(x, torch.full_like(index, wrong))
    with pytest.raises(ValueError, match="index and x must be on one device"):
        torch.ops.evit.gather_tokens(x, index.to("meta"))
