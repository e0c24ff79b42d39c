"""The gradient of evit_ext.ops.attention_with_scores."""

from __future__ import annotations

import pytest
import torch
from operator_tester import DTYPES, assert_near
from test_attention_with_scores import GRADIENT_SLACK, make

from evit_ext import ops


def test_gradient_of_either_result_alone(device: torch.device) -> None:
    qkv = make(2, 9, 2, 4).to(device).requires_grad_()
    for number in (0, 1):
        actual, expected = (
            torch.autograd.grad(f(qkv, 2)[number].square().sum(), qkv)[0]
            for f in (ops.attention_with_scores, ops.reference.attention_with_scores)
        )
        assert_near(actual, expected)


def test_differentiable_once(device: torch.device) -> None:
    qkv = make(2, 9, 2, 4).to(device).requires_grad_()
    (grad,) = torch.autograd.grad(ops.attention_with_scores(qkv, 2)[0].sum(), qkv, create_graph=True)
    match = "attention_with_scores is differentiable once; for higher derivatives run the model inside"
    with pytest.raises(RuntimeError, match=match if device.type == "cpu" else "derivative for"):
        grad.sum().backward()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 16, 17, 24, 25, 129])
@pytest.mark.parametrize("channels", [1, 24, 33, 64, 128])
def test_gradients_of_all_sizes(device: torch.device, dtype: torch.dtype, tokens: int, channels: int) -> None:
    qkv = make(2, tokens, 2, channels).to(device, dtype)
    weights = [w.to(dtype) for w in (torch.randn(2, tokens, 2 * channels), torch.randn(2, tokens))]
    grads = []
    for function, x in (
        (ops.attention_with_scores, qkv),
        (ops.reference.attention_with_scores, qkv.double()),
    ):
        results = function(x.requires_grad_(), 2)
        grads += torch.autograd.grad(results, x, [w.to(r) for w, r in zip(weights, results, strict=True)])
    # Rounded terms may cancel, where there are few: 1.6 times TOLERANCE was seen of two tokens in bfloat16.
    assert_near(*grads, slack=2 if device.type == "cpu" else GRADIENT_SLACK)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_where_all_attention_is_on_one_token(device: torch.device, dtype: torch.dtype) -> None:
    # Far beyond where exp overflows or vanishes: a softmax that is flat there, and values that go through.
    qkv = torch.zeros(1, 40, 3)
    qkv[0, :, 0] = 100.0
    qkv[0, :, 1] = torch.arange(40) * 2.0
    qkv[0, :, 2] = torch.arange(40)
    qkv = qkv.to(device, dtype).requires_grad_()
    out, scores = ops.attention_with_scores(qkv, 1, 1.0)
    (grad,) = torch.autograd.grad((out.sum() + scores[0, 3]), qkv)
    assert grad[0, :, :2].abs().le(1e-30).all()
    assert grad[0, 39, 2] == 40 and grad[0, :39, 2].abs().le(1e-30).all()


def test_the_gradient_of_the_operator_is_the_cpus(device: torch.device) -> None:
    if device.type == "cpu":
        qkv = make(2, 9, 2, 4).float()
        for bad, match in (
            ((qkv[:, :, :8], qkv[:1, :, 0], qkv), "must agree with qkv"),
            ((qkv[:, :, :7], qkv[:, :, 0], qkv), "must agree with qkv"),
            ((qkv[:, :, :8], qkv[:, :, 0], qkv[:, :, :23]), "3 \\* num_heads"),
            ((qkv[:, :, 0], qkv[:, :, 0], qkv), r"grad_out must have shape \[B, N, C\]"),
        ):
            with pytest.raises(RuntimeError, match=match):
                torch.ops.evit.attention_with_scores_backward(*bad, 2, 1.0)
        return
    qkv = make(2, 9, 2, 32).half().to(device).requires_grad_()
    out, _ = torch.ops.evit.attention_with_scores(qkv, 2, 1.0)
    with pytest.raises(RuntimeError, match="has a kernel for the CPU alone"):
        out.sum().backward()


@pytest.mark.parametrize("strides", [(1, 2, 1), (1, 1, 1), (0, 0, 1), (0, 1, 0)], ids=str)
def test_given_gradients_of_another_dtype(strides: tuple[int, int, int]) -> None:
    """As only a direct call gives them; where elements share memory, a conversion lays them out anew."""
    qkv, grad_scores = make(2, 9, 2, 4).float(), torch.randn(2, 9)
    grad_out = torch.randn(40, dtype=torch.float64).as_strided((2, 9, 8), strides)
    given, dense = (
        torch.ops.evit.attention_with_scores_backward(*grads, qkv, 2, 1.0)[0]
        for grads in ((grad_out, grad_scores.double()), (grad_out.contiguous().float(), grad_scores))
    )
    assert torch.equal(given, dense)
