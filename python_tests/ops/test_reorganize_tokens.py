"""Tests of evit_ext.ops.reorganize_tokens."""

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


def make(batch: int, tokens: int, channels: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, tokens, channels, dtype=torch.float64, generator=generator)
    # Distinct in every dtype up to 256 tokens, so that the same patches are chosen in all of them.
    order = torch.stack([torch.randperm(tokens, generator=generator) for _ in range(batch)])
    return x, order.double() / 256


class TestReorganizeTokens(OperatorTester):
    operator = staticmethod(ops.reorganize_tokens)
    reference = staticmethod(ops.reference.reorganize_tokens)
    qualified_name = "reorganize_tokens"

    @staticmethod
    def cases() -> list[Case]:
        x, scores = make(2, 7, 5)
        return [
            Case("small", (x, scores), {"num_keep": 4}),
            Case("without fusing", (x, scores), {"num_keep": 4, "fuse": False}),
            Case("scores of patch tokens", (x, scores[:, 1:]), {"num_keep": 3}),
            Case("keep one", (x, scores), {"num_keep": 1}),
            Case("keep all", (x, scores), {"num_keep": 6}),
            Case("fuse one", (x, scores), {"num_keep": 5}),
            Case("two prefix tokens", (x, scores), {"num_keep": 2, "num_prefix_tokens": 2}),
            Case("no prefix token", (x, scores), {"num_keep": 4, "num_prefix_tokens": 0}),
            Case("no channels", (x[..., :0], scores), {"num_keep": 3}),
            Case("DeiT-S", make(2, 197, 384), {"num_keep": 138}),
            Case("odd", make(3, 129, 33), {"num_keep": 57, "num_prefix_tokens": 5}),
            Case("wide, batch of one", make(1, 50, 1030), {"num_keep": 20}),
        ]

    @staticmethod
    def raw_args(args: list[Any], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        return (*args, kwargs["num_keep"], kwargs.get("num_prefix_tokens", 1), kwargs.get("fuse", True))


@pytest.mark.parametrize("x_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scores_dtype", DTYPES, ids=str)
def test_scores_may_have_another_dtype(
    device: torch.device, x_dtype: torch.dtype, scores_dtype: torch.dtype
) -> None:
    x, scores = (t.to(device) for t in make(2, 30, 20))
    x, scores = x.to(x_dtype).requires_grad_(), (scores / 8).to(scores_dtype).requires_grad_()
    tokens, kept = ops.reorganize_tokens(x, scores, 17)
    expected, expected_kept = ops.reference.reorganize_tokens(x.double(), scores.double(), 17)
    assert tokens.dtype == x_dtype
    assert torch.equal(kept, expected_kept)
    assert_near(tokens, expected, x_dtype)
    tokens.sum().backward()
    assert x.grad is not None and x.grad.dtype == x_dtype
    assert scores.grad is not None and scores.grad.dtype == scores_dtype


def select(
    values: list[float], num_keep: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> list[int]:
    scores = torch.tensor([values], dtype=dtype, device=device)
    x = torch.ones(1, len(values), 1, device=device)
    kept = ops.reorganize_tokens(x, scores, num_keep, num_prefix_tokens=0)[1]
    assert torch.equal(kept, ops.reference.reorganize_tokens(x, scores, num_keep, num_prefix_tokens=0)[1])
    return kept[0].tolist()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ties_go_to_the_lower_index(device: torch.device, dtype: torch.dtype) -> None:
    assert select([0.5] * 9, 4, device, dtype) == [0, 1, 2, 3]
    assert select([0.0, 1.0, 0.5, 0.5, 0.5, 1.0], 4, device, dtype) == [1, 2, 3, 5]
    assert select([-0.0, 0.0, -0.0, -1.0], 2, device, dtype) == [0, 1]
    assert select([-0.0, 0.0, 0.0], 1, device, dtype) == [0]
    assert select([-1.0, -2.0, -1.0, -3.0], 2, device, dtype) == [0, 2]


def test_of_tied_tokens_the_later_ones_are_fused(device: torch.device) -> None:
    for count, keep in ((9, 4), (40, 3), (6, 5), (300, 100)):
        x = torch.arange(1.0, count + 1, device=device).reshape(1, count, 1).repeat(2, 1, 1)
        tokens, kept = ops.reorganize_tokens(x, torch.ones(2, count, device=device), keep, 0)
        assert kept.tolist() == [list(range(keep))] * 2
        assert tokens[:, -1, 0].tolist() == [sum(range(keep + 1, count + 1))] * 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_is_the_largest(device: torch.device, dtype: torch.dtype) -> None:
    assert select([1.0, NAN, INF, 2.0, -NAN, -INF], 1, device, dtype) == [1]
    assert select([1.0, NAN, INF, 2.0, -NAN, -INF], 2, device, dtype) == [1, 4]
    assert select([1.0, NAN, INF, 2.0, -NAN, -INF], 3, device, dtype) == [1, 2, 4]
    assert select([-INF, -INF, 0.0, -INF], 2, device, dtype) == [0, 2]
    assert select([NAN] * 5, 3, device, dtype) == [0, 1, 2]


def test_nearby_and_subnormal_scores_are_told_apart(device: torch.device) -> None:
    tiny = 2.0**-149
    assert select([0.0, tiny, 2 * tiny, -tiny], 2, device) == [1, 2]
    one, above = 1.0, 1.0 + 2.0**-23
    assert select([one, above, one, above], 2, device) == [1, 3]
    assert select([1.0, 1.0 + 2.0**-52, 1.0], 1, device, torch.float64) == [1]


def test_fused_token_is_not_touched_by_kept_infinities(device: torch.device) -> None:
    x = torch.tensor([[[5.0], [INF], [1.0], [2.0]]], device=device)
    scores = torch.tensor([[0.0, NAN, 0.25, 0.5]], device=device)
    tokens, kept = ops.reorganize_tokens(x, scores, 1)
    assert kept.tolist() == [[0]]
    assert tokens.flatten().tolist() == [5.0, INF, 1.25]


def test_keep_all_changes_nothing(device: torch.device) -> None:
    x, scores = (t.to(device) for t in make(2, 9, 4))
    for fuse in (True, False):
        tokens, kept = ops.reorganize_tokens(x, scores, 8, fuse=fuse)
        assert torch.equal(tokens, x) and tokens.data_ptr() != x.data_ptr()
        assert torch.equal(kept, torch.arange(8, device=device).expand(2, -1))


def test_equals_its_parts(device: torch.device) -> None:
    x, scores = (t.to(device) for t in make(3, 40, 24))
    tokens, kept = ops.reorganize_tokens(x, scores, 13, num_prefix_tokens=2)
    patches, patch_scores = x[:, 2:], scores[:, 2:]
    best = patch_scores.topk(13).indices.sort(dim=1).values
    others = patch_scores.topk(25, largest=False).indices.sort(dim=1).values
    assert torch.equal(kept, best)
    assert torch.equal(tokens[:, :2], x[:, :2])
    assert torch.equal(tokens[:, 2:15], ops.gather_tokens(patches, best))
    # The CUDA kernels sum the same terms in another order.
    assert_near(tokens[:, 15], ops.fuse_tokens(patches, patch_scores, others))


def test_scalars_reach_the_kernel(device: torch.device) -> None:
    x, scores = (t.to(device) for t in make(1, 101, 3))
    tokens, kept = ops.reorganize_tokens(x, scores, 29, 13, False)
    assert tokens.shape == (1, 42, 3) and kept.shape == (1, 29)


def test_gradient_reaches_the_scores_of_fused_tokens_only(device: torch.device) -> None:
    x, scores = (t.to(device) for t in make(2, 8, 3))
    scores.requires_grad_()
    tokens, kept = ops.reorganize_tokens(x, scores, 3)
    (grad,) = torch.autograd.grad(tokens.sum(), scores)
    fused = torch.ones(2, 8, dtype=torch.bool, device=device)
    fused[:, 0] = False
    fused.scatter_(1, kept + 1, False)
    torch.testing.assert_close(grad, x.sum(-1) * fused, rtol=1e-12, atol=1e-12)


@random_examples(120)
@given(data=st.data())
def test_random_shapes(device: torch.device, data: st.DataObject) -> None:
    batch = data.draw(st.integers(0, 4))
    tokens = data.draw(st.integers(1, 90))
    prefix = data.draw(st.integers(0, tokens - 1))
    keep = data.draw(st.integers(1, tokens - prefix))
    channels = data.draw(st.integers(0, 140))
    fuse = data.draw(st.booleans())
    dtype = data.draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    x = torch.randn(batch, tokens, channels, dtype=torch.float64, generator=generator).to(device, dtype)
    # Few distinct values: ties everywhere.
    scores = torch.randint(-3, 4, (batch, tokens), generator=generator).to(device, dtype) / 64
    actual = ops.reorganize_tokens(x, scores, keep, prefix, fuse)
    expected = ops.reference.reorganize_tokens(x.double(), scores.double(), keep, prefix, fuse)
    for a, b in zip(actual, expected, strict=True):
        assert_near(a, b)


@pytest.mark.parametrize("tokens", [1000, 4097, 65537])
def test_many_tokens(device: torch.device, tokens: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(1, tokens, 2, generator=generator).to(device)
    scores = torch.rand(1, tokens, generator=generator).to(device)
    tokens_out, kept = ops.reorganize_tokens(x, scores, tokens // 3)
    best = scores[:, 1:].sort(dim=1, descending=True, stable=True).indices[:, : tokens // 3]
    assert torch.equal(kept, best.sort(dim=1).values)
    assert torch.equal(tokens_out[:, 1:-1], ops.gather_tokens(x[:, 1:], kept))


def test_errors(device: torch.device) -> None:
    x, scores = (t.float().to(device) for t in make(2, 7, 5))
    for function in (ops.reorganize_tokens, ops.reference.reorganize_tokens):
        for wrong in (0, -1, 7):
            with pytest.raises(ValueError, match=rf"num_keep must be in \[1, 6\].*got {wrong}"):
                function(x, scores, wrong)
        with pytest.raises(TypeError, match="num_keep must be an int, got float"):
            function(x, scores, 3.0)
        with pytest.raises(TypeError, match="fuse must be a bool, got str"):
            function(x, scores, 3, 1, "no")
        with pytest.raises(TypeError, match="num_keep must be an int, got bool"):
            function(x, scores, True)
        with pytest.raises(ValueError, match=r"num_prefix_tokens must be in \[0, 7\).*got 7"):
            function(x, scores, 1, 7)
        with pytest.raises(ValueError, match=r"scores must have shape \(2, 7\).*or \(2, 6\).*got \(2, 5\)"):
            function(x, scores[:, :5], 3)
        with pytest.raises(TypeError, match="scores must be float32.*got torch.int64"):
            function(x, scores.long(), 3)
        with pytest.raises(ValueError, match=r"x must have shape \[B, N, C\], got \(2, 7\)"):
            function(scores, scores, 3)
        with pytest.raises(ValueError, match="on one device"):
            function(x, scores.to("meta"), 3)


def test_operator_refuses_what_the_function_would(device: torch.device) -> None:
    x, scores = (t.float().to(device) for t in make(2, 7, 5))
    operator = torch.ops.evit.reorganize_tokens
    for args in (
        (x, scores, 0, 1),
        (x, scores, 7, 1),
        (x, scores, 1, 7),
        (x, scores[:, :4], 1, 1),
        (x, x, 1, 1),
    ):
        with pytest.raises(RuntimeError):
            operator(*args, True)
    tokens, kept = operator(x, scores, 3, 1, True)
    backward = torch.ops.evit.reorganize_tokens_backward
    for args in (
        (tokens[:, 1:], x, scores, kept, 1),
        (tokens.double(), x, scores, kept, 1),
        (tokens, x, scores, kept.int(), 1),
        (tokens, x, scores, kept[:1], 1),
        (tokens, x[:1], scores, kept, 1),
    ):
        with pytest.raises(RuntimeError):
            backward(*args)
    # A CUDA kernel does not look, which would cost a pass over kept: what comes of it means nothing.
    for wrong in ([3, 1, 2], [1, 1, 2], [0, 1, 6], [-1, 0, 1]) if device.type == "cpu" else ():
        with pytest.raises(RuntimeError, match=r"kept must be ascending and in \[0, 6\), got"):
            backward(tokens, x, scores, torch.tensor([wrong, wrong], device=device), 1)
    with pytest.raises(ValueError, match="scores and x must be on one device"):
        operator(x, scores.to("meta"), 3, 1, True)
