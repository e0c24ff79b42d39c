"""Tests of evit_ext.ops.attention_with_scores with a bias of the keys."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from operator_tester import DTYPES, Case, OperatorTester, assert_near
from torch import Tensor

from evit_ext import ops

INF, NAN = float("inf"), float("nan")


def make(batch: int, tokens: int, heads: int, channels: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, tokens, 3 * heads * channels, dtype=torch.float64, generator=generator)


def make_bias(batch: int, tokens: int, seed: int = 5) -> Tensor:
    """Logarithms of sizes, as ToMe adds them; in float16 and bfloat16 they are rounded."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 30, (batch, tokens), generator=generator).double().log()


class TestWithKeyBias(OperatorTester):
    operator = staticmethod(ops.attention_with_scores)
    reference = staticmethod(ops.reference.attention_with_scores)
    qualified_name = "attention_with_scores"
    gradient_devices = frozenset({"cpu"})
    scores = (1,)
    gradient_slack = 3  # as without a bias

    @staticmethod
    def cases() -> list[Case]:
        return [
            Case("small", (make(2, 7, 3, 5), 3, None, make_bias(2, 7))),
            Case("one token", (make(1, 1, 1, 1), 1, None, make_bias(1, 1))),
            Case("negative scale", (make(1, 5, 2, 3), 2, -2.0, make_bias(1, 5))),
            Case("DeiT-S", (make(2, 197, 6, 64), 6, None, make_bias(2, 197))),
            Case("odd", (make(3, 129, 2, 33), 2, 0.2, make_bias(3, 129))),
            Case("long", (make(1, 1134, 1, 80), 1, None, make_bias(1, 1134))),
        ]

    @staticmethod
    def raw_args(args: list[Any], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        qkv, heads, scale, key_bias = args
        return qkv, heads, (qkv.shape[2] // (3 * heads)) ** -0.5 if scale is None else scale, key_bias


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_key_bias_is_attention_with_a_mask(device: torch.device, dtype: torch.dtype) -> None:
    qkv = make(2, 61, 3, 32).to(device, dtype)
    bias = make_bias(2, 61).to(device, torch.float64 if dtype == torch.float64 else torch.float32)
    bias[0, 3] = bias[1, 60] = -INF
    q, k, v = ops.reference.unpacked(qkv.double(), 3)
    wide = bias.double()
    out, scores = ops.attention_with_scores(qkv, 3, key_bias=bias)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=wide[:, None, None])
    assert_near(out, expected.transpose(1, 2).flatten(2))
    row = (q[:, :, :1] @ k.transpose(2, 3)).squeeze(2) * 32**-0.5 + wide[:, None]
    assert_near(scores, row.softmax(-1).mean(1))
    assert scores[0, 3] == 0 and scores[1, 60] == 0
    # The same to all keys changes nothing, none at all changes no bit of what was.
    zero = ops.attention_with_scores(qkv, 3, key_bias=torch.zeros_like(bias))
    for a, b in zip(zero, ops.attention_with_scores(qkv.double(), 3), strict=True):
        assert_near(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 16, 17, 25, 129])
def test_key_bias_of_all_sizes(device: torch.device, dtype: torch.dtype, tokens: int) -> None:
    accumulated = torch.float64 if dtype == torch.float64 else torch.float32
    qkv, bias = make(2, tokens, 2, 32).to(device, dtype), make_bias(2, tokens).to(device, accumulated)
    weights = [w.to(dtype) for w in (torch.randn(2, tokens, 64), torch.randn(2, tokens))]
    results, grads = [], []
    for function, x, b in (
        (ops.attention_with_scores, qkv, bias),
        (ops.reference.attention_with_scores, qkv.double(), bias.double()),
    ):
        leaves = (x.requires_grad_(), b.clone().requires_grad_())
        results.append(function(leaves[0], 2, key_bias=leaves[1]))
        given = [w.to(r) for w, r in zip(weights, results[-1], strict=True)]
        grads.append(torch.autograd.grad(results[-1], leaves, given))
    slack = 2 if device.type == "cpu" else TestWithKeyBias.gradient_slack
    for actual, expected in zip(*results, strict=True):
        assert_near(actual, expected)
    assert_near(grads[0][0], grads[1][0], slack=slack)
    assert grads[0][1].dtype == accumulated
    # A sum over all queries and heads of what was made of values in `dtype`.
    assert_near(grads[0][1], grads[1][1], dtype, slack=slack)


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_key_bias_does_what_it_does_in_softmax(device: torch.device, dtype: torch.dtype) -> None:
    qkv = make(1, 6, 1, 4).to(device, dtype)
    q, k, v = ops.reference.unpacked(qkv.double(), 1)
    for first, last in ((0, 1), (2, 6), (0, 6)):
        for bad in (NAN, INF, -INF, 1e4, -1e4):
            bias = torch.zeros(1, 6, device=device)
            bias[:, first:last] = bad
            out, scores = ops.attention_with_scores(qkv, 1, key_bias=bias)
            attention = (q @ k.transpose(2, 3) * 0.5 + bias.double()).softmax(-1)
            # A bias so large takes digits from the products.
            slack = 1000 if dtype != torch.float64 and abs(bad) == 1e4 and last == 6 else 1
            assert_near(out, (attention @ v).transpose(1, 2).flatten(2), slack=slack)
            assert_near(scores, attention[:, 0, 0], slack=slack)


def test_gradients_of_masked_keys_are_zero(device: torch.device) -> None:
    qkv = make(2, 9, 2, 4).to(device).requires_grad_()
    bias = torch.zeros(2, 9, dtype=torch.float64, device=device)
    bias[:, 4] = -INF
    bias.requires_grad_()
    out, scores = ops.attention_with_scores(qkv, 2, key_bias=bias)
    grad_qkv, grad_bias = torch.autograd.grad(out[:, 0].square().sum() + scores.square().sum(), (qkv, bias))
    assert not grad_bias[:, 4].any() and not grad_qkv[:, 4].any()
    assert grad_bias.isfinite().all() and grad_bias[:, :4].any()


def test_autocast_leaves_the_key_bias(device: torch.device) -> None:
    qkv, bias = make(1, 9, 2, 8).float().to(device), make_bias(1, 9).float().to(device)
    with torch.no_grad():
        with torch.autocast(device.type, dtype=torch.bfloat16):
            mixed = ops.attention_with_scores(qkv, 2, key_bias=bias)
        for a, b in zip(mixed, ops.attention_with_scores(qkv.bfloat16(), 2, key_bias=bias), strict=True):
            assert torch.equal(a, b)


def test_errors_of_the_key_bias(device: torch.device) -> None:
    qkv = make(2, 7, 3, 5).float().to(device)
    bias = torch.zeros(2, 7, device=device)
    for function in (ops.attention_with_scores, ops.reference.attention_with_scores):
        with pytest.raises(TypeError, match=r"key_bias must be a tensor of shape \[B, N\], got float"):
            function(qkv, 3, key_bias=1.0)
        with pytest.raises(ValueError, match=r"key_bias must have shape \[B, N\], got \(7,\)"):
            function(qkv, 3, key_bias=bias[0])
        with pytest.raises(TypeError, match="key_bias must be float32, float16, bfloat16 or float64, got"):
            function(qkv, 3, key_bias=bias.long())
        for wrong in (bias[:1], bias[:, :6]):
            with pytest.raises(ValueError, match=r"key_bias must have shape \[B, N\] of qkv = \(2, 7\), got"):
                function(qkv, 3, key_bias=wrong)
        with pytest.raises(ValueError, match="key_bias and qkv must be on one device"):
            function(qkv, 3, key_bias=bias.to("meta"))
    for wrong, match in (
        (bias[:1], "must have shape"),
        (bias[0], "must have shape"),
        (bias.long(), "key_bias: expected float32"),
    ):
        for call in (
            lambda wrong=wrong: torch.ops.evit.attention_with_scores(qkv, 3, 1.0, wrong),
            lambda wrong=wrong: torch.ops.evit.attention_with_scores_backward(
                qkv[:, :, :15], bias, qkv, 3, 1.0, wrong
            ),
        ):
            with pytest.raises(RuntimeError, match=match):
                call()
