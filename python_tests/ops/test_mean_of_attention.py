"""Tests of evit_ext.ops.attention_with_scores with the mean over all tokens as scores."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from operator_tester import DTYPES, TOLERANCE, Case, OperatorTester, assert_near
from torch import Tensor

from evit_ext import ops


def make(batch: int, tokens: int, heads: int, channels: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, tokens, 3 * heads * channels, dtype=torch.float64, generator=generator)


class TestMeanOfAttention(OperatorTester):
    operator = staticmethod(ops.attention_with_scores)
    reference = staticmethod(ops.reference.attention_with_scores)
    qualified_name = "attention_with_scores"
    gradient_devices = frozenset({"cpu"})
    scores = (1,)
    gradient_slack = 3  # as of the class token's scores

    @staticmethod
    def cases() -> list[Case]:
        bias = torch.linspace(0.0, 3.0, 2 * 29, dtype=torch.float64).view(2, 29)
        return [
            Case("small", (make(2, 7, 3, 5), 3), {"mean": True}),
            Case("one token", (make(1, 1, 1, 1), 1), {"mean": True}),
            Case("negative scale", (make(1, 5, 2, 3), 2), {"mean": True, "scale": -2.0}),
            Case("SigLIP", (make(2, 196, 3, 64), 3), {"mean": True}),
            Case("odd", (make(3, 129, 2, 33), 2), {"mean": True}),
            Case("with a bias", (make(2, 29, 2, 33), 2, 0.3, bias), {"mean": True}),
        ]

    @staticmethod
    def raw_args(args: list[Any], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        qkv, heads, scale, bias = (*args, None, None)[:4]
        default = kwargs.get("scale", (qkv.shape[2] // (3 * heads)) ** -0.5)
        return qkv, heads, default if scale is None else scale, bias, True

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_matches_float64_reference(self, device: torch.device, dtype: torch.dtype) -> None:
        """As the base's, but in bfloat16 scores are means of probabilities that may be rounded."""
        for case in self.cases():
            args = case.cast(dtype, device)
            out, scores = self._call(case, args)
            expected = self._expected(case, args)
            assert_near(out, expected[0])
            assert_near(scores, expected[1], torch.bfloat16 if dtype == torch.bfloat16 else None)
            assert scores.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 2, 16, 17, 24, 25, 31, 33, 64, 97, 577])
def test_is_attention_and_mean_attention(
    device: torch.device, dtype: torch.dtype, tokens: int, pytestconfig: pytest.Config
) -> None:
    for channels in (8, 33, 64):
        qkv = make(2, tokens, 2, channels).to(device, dtype)
        out, scores = ops.attention_with_scores(qkv, 2, mean=True)
        without = ops.attention_with_scores(qkv, 2)[0]
        if pytestconfig.getoption("--cuda-on-host"):  # another kernel's, which sums in another order
            assert_near(out, without.double(), slack=2)
        else:
            assert torch.equal(out, without)
        if tokens == 0:
            assert scores.shape == (2, 0)
            continue
        q, k, _ = ops.reference.unpacked(qkv.double(), 2)
        expected = ops.mean_attention(q, k)
        rounded = dtype == torch.bfloat16
        assert_near(scores, expected, torch.bfloat16 if rounded else None)
        torch.testing.assert_close(
            scores.sum(1), torch.ones_like(scores[:, 0]), rtol=1e-5, atol=1e-5 if rounded else 1e-6
        )


@torch.no_grad()
def test_rounding_averages_out(device: torch.device) -> None:
    """A rounded probability is off by up to 2^-9 of itself, the mean of hundreds by far less."""
    qkv = make(1, 197, 6, 64).to(device, torch.bfloat16)
    scores = ops.attention_with_scores(qkv, 6, mean=True)[1]
    q, k, _ = ops.reference.unpacked(qkv.double(), 6)
    error = (scores.double() / ops.mean_attention(q, k) - 1).abs().max()
    assert error < TOLERANCE[torch.bfloat16] / 10


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bit_identical_whatever_the_threads_and_the_batch(device: torch.device, dtype: torch.dtype) -> None:
    qkv = make(3, 197, 2, 64).to(device, dtype)
    threads = torch.get_num_threads()
    seen = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            seen.append(ops.attention_with_scores(qkv, 2, mean=True)[1])
    finally:
        torch.set_num_threads(threads)
    seen.append(torch.cat([ops.attention_with_scores(entry[None], 2, mean=True)[1] for entry in qkv]))
    for scores in seen[1:]:
        assert torch.equal(scores, seen[0])


def test_mean_must_be_a_bool(device: torch.device) -> None:
    for function in (ops.attention_with_scores, ops.reference.attention_with_scores):
        with pytest.raises(TypeError, match="mean must be a bool, got int"):
            function(make(1, 3, 1, 2).to(device), 1, mean=1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_composed_of_pytorchs_operators(
    device: torch.device, dtype: torch.dtype, mean: bool, biased: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What runs on devices whose kernel does not take the tensors."""
    module = importlib.import_module("evit_ext.ops.attention_with_scores")
    monkeypatch.setattr(module, "_kernel_takes", lambda *arguments: False)
    qkv = make(2, 29, 2, 16).to(device, dtype).requires_grad_()
    # Numbers that bfloat16 has: PyTorch's attention takes the bias in the dtype of qkv.
    bias = (torch.arange(2 * 29, device=device, dtype=torch.float64).view(2, 29) % 17 / 8).to(dtype)
    bias[0, 3] = float("-inf")
    results = ops.attention_with_scores(qkv, 2, 0.2, bias if biased else None, mean)
    wide = qkv.detach().double().requires_grad_()
    expected = ops.reference.attention_with_scores(wide, 2, 0.2, bias.double() if biased else None, mean)
    for a, b in zip(results, expected, strict=True):
        assert_near(a, b)
    grads = [
        torch.autograd.grad(out.float().square().sum() + 9 * scores.square().sum(), x)[0]
        for (out, scores), x in ((results, qkv), (expected, wide))
    ]
    # The loss is a sum in float32.
    assert_near(*grads, torch.float32 if dtype == torch.float64 else None, slack=3)
