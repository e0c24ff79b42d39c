"""The scores that rank patches, in every dtype; what models make of them is in families/."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from evit_ext import ops
from evit_ext.patching.attention import class_token_scores

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def tensors(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys [2, 3, 19, 8], and a bias [2, 3, 19, 19] as large as their products."""
    return tuple(torch.randn(2, 3, 19, width, dtype=torch.float64).to(device, dtype) for width in (8, 8, 19))  # type: ignore[return-value]


def exact(q: Tensor, k: Tensor, bias: Tensor) -> Tensor:
    """The definition, in float64, by the whole map."""
    products = q.double() @ k.double().transpose(2, 3) / q.shape[3] ** 0.5
    return (products + bias.double()).softmax(dim=-1)[:, :, 0].mean(dim=1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_biased_scores_are_as_exact_as_the_operator(device: torch.device, dtype: torch.dtype) -> None:
    q, k, bias = tensors(dtype, device)
    for own in (bias, bias[:1]):  # of each image, or of all alike
        scores = class_token_scores(q, k, own)
        assert scores.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        # The largest error seen is 6e-8 in float32, that of one rounding.
        tolerance = 1e-14 if dtype == torch.float64 else 1e-6
        torch.testing.assert_close(scores.double(), exact(q, k, own), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_bias_of_zeros_is_none(device: torch.device, dtype: torch.dtype) -> None:
    q, k, bias = tensors(dtype, device)
    expected = ops.class_attention(q[:, :, 0], k)
    torch.testing.assert_close(class_token_scores(q, k, torch.zeros_like(bias)), expected)
    assert torch.equal(class_token_scores(q, k, None), expected)


def test_large_products_with_a_bias(device: torch.device) -> None:
    """Products beyond float16's largest, 65504, which scaled_dot_product_attention bears."""
    q = torch.full((1, 1, 2, 64), 40.0, device=device, dtype=torch.float16)
    k = torch.cat([q[:, :, :1], q[:, :, :1] * 0.999], dim=2)
    bias = torch.zeros(1, 1, 2, 2, device=device, dtype=torch.float16)
    torch.testing.assert_close(class_token_scores(q, k, bias).double(), exact(q, k, bias), rtol=1e-5, atol=0)


def test_biased_scores_under_autocast(device: torch.device) -> None:
    """Queries and keys are cast as scaled_dot_product_attention casts them, and the rest is exact."""
    q, k, bias = (t.requires_grad_() for t in tensors(torch.float32, device))
    with torch.autocast(device.type, dtype=torch.bfloat16):
        scores = class_token_scores(q, k, bias)
    assert torch.equal(scores, class_token_scores(q.bfloat16(), k.bfloat16(), bias))
    grads = torch.autograd.grad(scores.square().sum(), (q, k, bias))
    assert all(grad.dtype == torch.float32 and grad.any() for grad in grads)


def test_gradients_of_biased_scores(device: torch.device) -> None:
    args = [t.requires_grad_() for t in tensors(torch.float64, device)]
    assert torch.autograd.gradcheck(class_token_scores, args, fast_mode=True)

    def gradients(function: Any) -> tuple[Tensor, ...]:
        return torch.autograd.grad(function(*args).square().sum(), args)

    for a, b in zip(gradients(class_token_scores), gradients(exact), strict=True):
        torch.testing.assert_close(a, b)
