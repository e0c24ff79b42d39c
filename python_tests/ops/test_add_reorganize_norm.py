"""Tests of evit_ext.ops.add_reorganize_norm."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from operator_tester import DTYPES, Case, OperatorTester, assert_near, random_examples
from torch import Tensor

from evit_ext import ops

INF, NAN = float("inf"), float("nan")

#: Names of the arguments of ops.add_reorganize_norm behind its five tensors, and their defaults.
SCALARS = {"eps": 1e-6, "num_prefix_tokens": 1, "fuse": True}


def make(
    batch: int, tokens: int, channels: int, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x, branch, scores, weight, bias."""
    generator = torch.Generator().manual_seed(seed)
    x, branch = torch.randn(2, batch, tokens, channels, dtype=torch.float64, generator=generator)
    # Distinct in every dtype up to 256 tokens, so that the same patches are chosen in all of them.
    order = torch.stack([torch.randperm(tokens, generator=generator) for _ in range(batch)])
    weight, bias = torch.randn(2, channels, dtype=torch.float64, generator=generator)
    return x, branch, order.double() / 256, weight + 1, bias


def case(name: str, tensors: tuple[Tensor, ...], num_keep: int, **kwargs: Any) -> Case:
    x, branch, scores, weight, bias = tensors
    return Case(name, (x, branch, scores, num_keep, weight, bias), kwargs)


class TestAddReorganizeNorm(OperatorTester):
    operator = staticmethod(ops.add_reorganize_norm)
    reference = staticmethod(ops.reference.add_reorganize_norm)
    qualified_name = "add_reorganize_norm"
    gradient_devices = frozenset[str]()
    # LayerNorm's gradients are PyTorch's, with several roundings to 16 bits in a row: 5.3 times TOLERANCE in
    # bfloat16 and 4.3 in float16 are the largest errors seen, both in the gradients of weight and bias.
    gradient_slack = 8

    @staticmethod
    def cases() -> list[Case]:
        small = make(2, 7, 5)
        x, branch, scores, weight, bias = small
        return [
            case("small", small, 4),
            case("eps", small, 4, eps=0.3),
            case("without fusing", small, 4, fuse=False),
            case("scores of patch tokens", (x, branch, scores[:, 1:], weight, bias), 3),
            case("keep one", small, 1),
            case("keep all", small, 6),
            case("keep all, without fusing", small, 6, fuse=False),
            case("fuse one", small, 5),
            case("two prefix tokens", small, 2, num_prefix_tokens=2),
            case("no prefix token", small, 4, num_prefix_tokens=0),
            Case("no weight", (x, branch, scores, 3, None, bias)),
            Case("no bias", (x, branch, scores, 3, weight, None)),
            Case("not affine", (x, branch, scores, 3)),
            case("DeiT-S", make(2, 197, 384), 138),
            case("odd", make(3, 129, 33), 57, num_prefix_tokens=5),
            case("wide, batch of one", make(1, 50, 1030), 20),
        ]

    @staticmethod
    def raw_args(args: list[Any], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        parameters = [*args[4:], None, None][:2]
        return (*args[:4], *parameters, *(kwargs.get(name, default) for name, default in SCALARS.items()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scores_dtype", DTYPES, ids=str)
def test_tokens_are_those_of_reorganize_tokens(
    device: torch.device, dtype: torch.dtype, scores_dtype: torch.dtype
) -> None:
    for batch, tokens, channels, keep in ((2, 30, 20, 17), (1, 197, 384, 138), (3, 12, 65, 11)):
        x, branch, scores, weight, bias = (t.to(device, dtype) for t in make(batch, tokens, channels))
        scores = scores.to(scores_dtype)
        out, normed, kept = ops.add_reorganize_norm(x, branch, scores, keep, weight, bias)
        expected, expected_kept = ops.reorganize_tokens(x + branch, scores, keep)
        assert torch.equal(out, expected) and torch.equal(kept, expected_kept)
        assert normed.data_ptr() != out.data_ptr()


def test_normalises_the_rounded_tokens(device: torch.device) -> None:
    # In bfloat16 100 + 0.25 is 100: a row of such sums has no variance, and eps is all there is.
    x = torch.full((1, 3, 8), 100.0, dtype=torch.bfloat16, device=device)
    branch = torch.zeros_like(x)
    branch[..., ::2] = 0.25
    tokens, normed, _ = ops.add_reorganize_norm(x, branch, torch.zeros(1, 3, device=device), 1, eps=1e-6)
    assert tokens.eq(torch.tensor([100.0, 100.0, 0.0], device=device).bfloat16().view(1, 3, 1)).all()
    assert normed.eq(0).all()


def test_every_scalar_reaches_the_kernel(device: torch.device) -> None:
    # x is 1 and -1 alternately: mean 0, variance 1, so that normed is x / sqrt(1 + eps).
    x = torch.ones(1, 101, 4, device=device)
    x[..., ::2] = -1
    scores = torch.arange(101.0, device=device).unsqueeze(0)
    tokens, normed, kept = ops.add_reorganize_norm(
        x, torch.zeros_like(x), scores, 29, eps=3.0, num_prefix_tokens=13, fuse=False
    )
    assert tokens.shape == normed.shape == (1, 42, 4)
    assert kept.tolist() == [list(range(59, 88))]
    assert torch.equal(normed, tokens / 2)


def test_one_channel(device: torch.device) -> None:
    x, branch, scores, weight, bias = (t.float().to(device) for t in make(2, 9, 1))
    tokens, normed, _ = ops.add_reorganize_norm(x, branch, scores, 3, weight, bias)
    assert torch.equal(tokens[:, :1], x[:, :1] + branch[:, :1])
    assert torch.equal(normed, bias.expand(2, 5, 1))


def test_offset_does_not_cost_precision(device: torch.device) -> None:
    # A variance formed as a difference of squares would have no correct digit.
    x, branch, scores, weight, bias = (t.float().to(device) for t in make(2, 40, 48))
    x = x * 0.01 + 100
    tokens, normed, _ = ops.add_reorganize_norm(x, branch * 0.01, scores, 20, weight, bias)
    expected = F.layer_norm(tokens.double(), (48,), weight.double(), bias.double(), 1e-6)
    # The rounding of a mean of 100 counts in units of the deviation, 0.014. Seen: 2.6e-3; PyTorch's: 3.0e-3.
    torch.testing.assert_close(normed.double()[:, :-1], expected[:, :-1], rtol=0, atol=6e-3)


def test_nan_and_inf_stay_in_their_row(device: torch.device) -> None:
    for bad in (NAN, INF):
        x, branch, scores, weight, bias = (t.float().to(device) for t in make(1, 6, 20))
        clean = ops.add_reorganize_norm(x, branch, scores, 3, weight, bias, num_prefix_tokens=1)
        kept = int(clean[2][0, 1])
        branch[0, 1 + kept, 7] = bad
        tokens, normed, _ = ops.add_reorganize_norm(x, branch, scores, 3, weight, bias)
        assert normed[0, 2].isnan().all()
        others = [0, 1, 3, 4]
        assert torch.equal(normed[:, others], clean[1][:, others])
        assert torch.equal(tokens[:, others], clean[0][:, others])


def test_nan_scores_are_kept(device: torch.device) -> None:
    x, branch, scores, weight, bias = (t.float().to(device) for t in make(1, 6, 20))
    scores[0, 4] = NAN
    tokens, normed, kept = ops.add_reorganize_norm(x, branch, scores, 1, weight, bias)
    assert kept.tolist() == [[3]]
    assert tokens.isfinite().all() and normed.isfinite().all()


def test_ties_go_to_the_lower_index(device: torch.device) -> None:
    x, branch, scores, *_ = (t.float().to(device) for t in make(2, 40, 3))
    kept = ops.add_reorganize_norm(x, branch, torch.ones_like(scores), 9, num_prefix_tokens=0)[2]
    assert kept.tolist() == [list(range(9))] * 2


@random_examples(120)
@given(data=st.data())
def test_random_shapes(device: torch.device, data: st.DataObject) -> None:
    batch = data.draw(st.integers(0, 4))
    tokens = data.draw(st.integers(1, 90))
    prefix = data.draw(st.integers(0, tokens - 1))
    keep = data.draw(st.integers(1, tokens - prefix))
    channels = data.draw(st.integers(1, 140))
    fuse = data.draw(st.booleans())
    dtype = data.draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    x, branch = (
        torch.randn(batch, tokens, channels, generator=generator).to(device, dtype) for _ in range(2)
    )
    weight, bias = (
        torch.randn(channels, generator=generator).to(device, dtype) if data.draw(st.booleans()) else None
        for _ in range(2)
    )
    # Few distinct values: ties everywhere.
    scores = torch.randint(-3, 4, (batch, tokens), generator=generator).to(device, dtype) / 64
    # With a small eps, rows of few channels that happen to be nearly equal would amplify every rounding.
    actual, normed, kept = ops.add_reorganize_norm(
        x, branch, scores, keep, weight, bias, eps=0.5, num_prefix_tokens=prefix, fuse=fuse
    )
    expected, expected_kept = ops.reference.reorganize_tokens(x + branch, scores, keep, prefix, fuse)
    assert torch.equal(kept, expected_kept)
    assert_near(actual, expected.double())
    # On the CPU, whose norm of a single channel is exactly 0.
    wide = (p if p is None else p.double().cpu() for p in (weight, bias))
    assert_near(normed.cpu(), F.layer_norm(actual.double().cpu(), (channels,), *wide, 0.5))


@pytest.mark.parametrize("needing", ["x", "branch", "scores", "weight", "bias"])
def test_the_kernel_runs_only_where_no_gradient_is_needed(
    device: torch.device, needing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = dict(
        zip(("x", "branch", "scores", "weight", "bias"), (t.to(device) for t in make(2, 9, 6)), strict=True)
    )
    tensors[needing].requires_grad_()
    called: list[int] = []
    steps = ops.add_reorganize_norm.__globals__
    reorganize = steps["reorganize_tokens"]
    monkeypatch.setitem(steps, "reorganize_tokens", lambda *args: called.append(1) or reorganize(*args))
    with_gradient = ops.add_reorganize_norm(num_keep=4, **tensors)
    assert called and with_gradient[1].requires_grad
    called.clear()
    with torch.no_grad():
        without = ops.add_reorganize_norm(num_keep=4, **tensors)
    assert not called
    for a, b in zip(with_gradient, without, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


def test_the_operator_itself_refuses_to_be_differentiated(device: torch.device) -> None:
    tensors = [t.float().to(device) for t in make(2, 7, 5)]
    x, branch, scores, weight, bias = tensors
    for needing in tensors:
        needing.requires_grad_()
        tokens, normed, kept = torch.ops.evit.add_reorganize_norm(
            x, branch, scores, 3, weight, bias, 1e-6, 1, True
        )
        assert not kept.requires_grad
        for output in (tokens, normed):
            with pytest.raises(RuntimeError, match="has no gradient: call evit_ext.ops.add_reorganize_norm"):
                output.sum().backward()
        assert needing.grad is None
        needing.requires_grad_(False)


def test_autocast_changes_nothing(device: torch.device) -> None:
    x, branch, scores, weight, bias = (t.bfloat16().to(device) for t in make(2, 30, 20))
    for requires_grad in (False, True):
        x.requires_grad_(requires_grad)
        plain = ops.add_reorganize_norm(x, branch, scores, 9, weight, bias)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            under = ops.add_reorganize_norm(x, branch, scores, 9, weight, bias)
        for a, b in zip(plain, under, strict=True):
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b, rtol=2**-7, atol=2**-7)
        assert under[1].dtype == torch.bfloat16


def test_errors(device: torch.device) -> None:
    x, branch, scores, weight, bias = (t.float().to(device) for t in make(2, 7, 5))
    for function in (ops.add_reorganize_norm, ops.reference.add_reorganize_norm):
        with pytest.raises(ValueError, match=r"num_keep must be in \[1, 6\].*got 7"):
            function(x, branch, scores, 7)
        with pytest.raises(TypeError, match="branch must be a tensor of shape.*got float"):
            function(x, 1.0, scores, 3)
        with pytest.raises(TypeError, match="branch and x must have one dtype, got torch.bfloat16"):
            function(x, branch.bfloat16(), scores, 3)
        with pytest.raises(
            ValueError, match=r"branch must have the shape of x, \(2, 7, 5\), got \(2, 1, 5\)"
        ):
            function(x, branch[:, :1], scores, 3)
        with pytest.raises(ValueError, match=r"at least one channel, got shape \(2, 7, 0\)"):
            function(x[..., :0], branch[..., :0], scores, 3)
        with pytest.raises(ValueError, match=r"scores must have shape"):
            function(x, branch, scores[:, :3], 3)
        with pytest.raises(TypeError, match="eps must be a float, got str"):
            function(x, branch, scores, 3, weight, bias, "small")
        with pytest.raises(ValueError, match="eps must not be negative, got -1.0"):
            function(x, branch, scores, 3, weight, bias, -1.0)
        for name, good in (("weight", weight), ("bias", bias)):
            with pytest.raises(TypeError, match=f"{name} and x must have one dtype, got torch.float64"):
                function(x, branch, scores, 3, **{name: good.double()})
            with pytest.raises(ValueError, match=rf"{name} must have shape \[C\] = \(5,\), got \(4,\)"):
                function(x, branch, scores, 3, **{name: good[:4]})
            with pytest.raises(ValueError, match=rf"{name} must have shape \[C\], got \(1, 5\)"):
                function(x, branch, scores, 3, **{name: good.unsqueeze(0)})
            with pytest.raises(TypeError, match=f"{name} must be a tensor.*got int"):
                function(x, branch, scores, 3, **{name: 1})
            with pytest.raises(ValueError, match=f"{name} and x must be on one device"):
                function(x, branch, scores, 3, **{name: good.to("meta")})
        with pytest.raises(ValueError, match="branch and x must be on one device"):
            function(x, branch.to("meta"), scores, 3)


def test_operator_refuses_what_the_function_would(device: torch.device) -> None:
    x, branch, scores, weight, bias = (t.float().to(device) for t in make(2, 7, 5))
    operator = torch.ops.evit.add_reorganize_norm
    for args in (
        (x, branch, scores, 0, weight, bias),
        (x, branch, scores, 7, weight, bias),
        (x, branch[:1], scores, 3, weight, bias),
        (x, branch[:, :6], scores, 3, weight, bias),
        (x, branch[..., :4], scores, 3, weight, bias),
        (x, branch[0], scores, 3, weight, bias),
        (x, branch.double(), scores, 3, weight, bias),
        (x, branch, scores[:, :4], 3, weight, bias),
        (x, branch, scores, 3, weight[:4], bias),
        (x, branch, scores, 3, weight, bias[:4]),
        (x, branch, scores, 3, weight.double(), bias),
        (x, branch, scores, 3, weight, bias.unsqueeze(0)),
        (x[..., :0], branch[..., :0], scores, 3, None, None),
    ):
        with pytest.raises(RuntimeError):
            operator(*args, 1e-6, 1, True)
    with pytest.raises(RuntimeError):
        operator(x, branch, scores, 3, weight, bias, 1e-6, 7, True)
