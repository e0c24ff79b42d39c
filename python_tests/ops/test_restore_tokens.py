"""restore_tokens: what it computes, its gradients, and that it undoes reorganize_tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from operator_tester import DTYPES, Case, OperatorTester, assert_near, differentiable, random_examples
from restore_cases import make, make_fill, plain_loops
from torch import Tensor

from evit_ext import ops


class TestRestoreTokens(OperatorTester):
    operator = staticmethod(ops.restore_tokens)
    reference = staticmethod(ops.reference.restore_tokens)
    qualified_name = "restore_tokens"

    @staticmethod
    def cases() -> list[Case]:
        first_and_last = torch.tensor([[0, 3, 8]]), 9
        return [
            Case("fused", (*make(2, 4, 5, 7), 7)),
            Case("zero", (*make(2, 4, 5, 7, 1), 7, 1, "zero")),
            Case("zero, fused token ignored", (*make(2, 4, 5, 7), 7, 1, "zero")),
            Case("tensor", (*make(2, 4, 5, 7, 1), 7, 1, make_fill(2, 8, 5))),
            Case("tensor, fused token ignored", (*make(2, 4, 5, 7), 7, 1, make_fill(2, 8, 5))),
            Case("first and last", (make(1, 3, 4, 9)[0], *first_and_last)),
            Case("nothing dropped", (*make(2, 6, 3, 6, 1), 6)),
            Case("nothing dropped, tensor", (*make(2, 6, 3, 6), 6, 1, make_fill(2, 7, 3))),
            Case("nothing kept", (*make(2, 0, 3, 4), 4)),
            Case("no patches", (*make(2, 0, 3, 0, 1), 0)),
            Case("no prefix token", (*make(2, 4, 5, 9, 1), 9, 0)),
            Case("three prefix tokens", (*make(2, 4, 5, 9, 4), 9, 3)),
            Case("nothing but the grid", (*make(2, 4, 5, 9, 0), 9, 0, "zero")),
            Case("no channels", (*make(2, 3, 0, 5), 5)),
            Case("DeiT-S", (*make(2, 138, 384, 196), 196)),
            Case("DeiT-S, tensor", (*make(2, 138, 384, 196, 1), 196, 1, make_fill(2, 197, 384))),
            Case("odd", (*make(3, 57, 33, 124, 6), 124, 5)),
            Case("wide, batch of one", (*make(1, 20, 1030, 49), 49)),
            # So long that the gradient of the fused token is a sum of sums on a GPU.
            Case("long", (*make(1, 600, 9, 1300), 1300)),
        ]

    @staticmethod
    def raw_args(args: list[Any], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        tokens, kept, num_patches, prefix, fill = (*args, *(1, "fused")[len(args) - 3 :])
        given = fill if isinstance(fill, Tensor) else None
        fill_fused = given is None and fill == "fused" and kept.shape[1] < num_patches
        return tokens, kept, num_patches, prefix, fill_fused, given

    def test_opcheck_of_the_gradient(self, device: torch.device) -> None:
        for case in self.cases():
            args = case.cast(torch.float32, device)
            tokens, kept, _, prefix, fill_fused, _ = self.raw_args(args, {})
            grad = self._call(case, args).requires_grad_()
            torch.library.opcheck(
                torch.ops.evit.restore_tokens_backward, (grad, kept, tokens.shape[1], prefix, fill_fused)
            )

    def test_is_the_definition(self, device: torch.device) -> None:
        for case in self.cases():
            args = case.cast(torch.float32, torch.device("cpu"))
            expected = plain_loops(*args, *(1, "fused")[len(args) - 3 :])
            for function in (ops.restore_tokens, ops.reference.restore_tokens):
                actual = function(*(a.to(device) if isinstance(a, Tensor) else a for a in args))
                assert torch.equal(actual.cpu(), expected), case.name

    def test_differentiable_twice(self, device: torch.device) -> None:
        for case in self.cases():
            args = case.cast(torch.float64, device)
            if sum(a.numel() for a in args if isinstance(a, Tensor)) > 1000:
                continue
            leaves = differentiable(args)

            def results(*values: Tensor, args: list[Any] = args) -> Tensor:
                rest = iter(values)
                floating = (isinstance(a, Tensor) and a.is_floating_point() for a in args)
                return ops.restore_tokens(
                    *(next(rest) if is_floating else a for a, is_floating in zip(args, floating, strict=True))
                )

            assert torch.autograd.gradgradcheck(results, leaves)


@pytest.mark.parametrize("word", ["zero", "tensor"])
@pytest.mark.parametrize("others", [1, 2])
def test_compiles_with_other_fillings(device: torch.device, word: str, others: int) -> None:
    """In the loop of the operator's tests, the fused token fills."""
    torch._dynamo.reset()

    def restored(tokens: Tensor, kept: Tensor, given: Tensor) -> Tensor:
        return ops.restore_tokens(tokens, kept, 7, 1, given if word == "tensor" else "zero")

    compiled = torch.compile(restored, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (2, 5):
        tokens, kept = (t.to(device) for t in make(batch, 4, 3, 7, others))
        leaves = [tokens.requires_grad_(), make_fill(batch, 8, 3).to(device).requires_grad_()]
        eager, graph = restored(leaves[0], kept, leaves[1]), compiled(leaves[0], kept, leaves[1])
        assert torch.equal(eager, graph)
        grads = [torch.autograd.grad(out.square().sum(), leaves, allow_unused=True) for out in (eager, graph)]
        for a, b in zip(*grads, strict=True):
            assert (a is None and b is None) or torch.equal(a, b)
    batched = torch.export.Dim("batch", min=1, max=64)

    class Module(torch.nn.Module):
        def forward(self, tokens: Tensor, kept: Tensor, given: Tensor) -> Tensor:
            return restored(tokens, kept, given)

    inputs = (tokens.detach(), kept, leaves[1].detach())
    program = torch.export.export(Module(), inputs, dynamic_shapes=({0: batched},) * 3)
    smaller = tuple(t[:3] for t in inputs)
    assert torch.equal(program.module()(*smaller), restored(*smaller))


@random_examples(120)
@given(data=st.data())
def test_random_shapes(device: torch.device, data: st.DataObject) -> None:
    batch, channels = data.draw(st.integers(0, 4)), data.draw(st.integers(0, 140))
    num_patches, prefix = data.draw(st.integers(0, 90)), data.draw(st.integers(0, 4))
    num_kept = data.draw(st.integers(0, num_patches))
    dtype = data.draw(st.sampled_from(DTYPES))
    dropped = num_kept < num_patches
    word = data.draw(st.sampled_from(["fused", "zero", "tensor"]))
    fused = int(dropped) if word == "fused" else data.draw(st.integers(0, 1))
    seed = data.draw(st.integers(0, 99))
    tokens, kept = make(batch, num_kept, channels, num_patches, prefix + fused, seed)
    tokens = tokens.to(dtype)
    fill = make_fill(batch, prefix + num_patches, channels).to(dtype) if word == "tensor" else word
    leaves = differentiable([tokens, fill])
    inputs = [t.to(device) if isinstance(t, Tensor) else t for t in (tokens, kept, fill)]
    actual = ops.restore_tokens(inputs[0], inputs[1], num_patches, prefix, inputs[2])
    assert torch.equal(actual.cpu(), plain_loops(tokens, kept, num_patches, prefix, fill))

    weight = make_fill(*actual.shape).to(dtype)
    grads = torch.autograd.grad(actual, leaves, weight.to(device))
    is_kept = torch.zeros(batch, prefix + num_patches, 1, dtype=torch.bool)
    is_kept[:, :prefix] = True
    is_kept.scatter_(1, kept.unsqueeze(-1) + prefix, True)
    expected = torch.zeros(tokens.shape, dtype=torch.float64)
    expected[:, : prefix + num_kept] = weight.double()[is_kept.squeeze(-1)].view(
        batch, prefix + num_kept, channels
    )
    if word == "fused" and dropped:
        expected[:, -1] = weight.double().masked_fill(is_kept, 0).sum(dim=1)
    assert torch.equal(grads[0][:, : prefix + num_kept].double(), expected[:, : prefix + num_kept])
    assert_near(grads[0], expected)
    if word == "tensor":
        assert torch.equal(grads[1], weight.masked_fill(is_kept, 0))


@pytest.mark.parametrize("fuse", [True, False])
def test_undoes_reorganize_tokens(device: torch.device, fuse: bool) -> None:
    x = torch.randn(3, 40, 24, device=device)
    scores = torch.rand(3, 40, device=device)
    for keep in (1, 13, 37, 38):
        tokens, kept = ops.reorganize_tokens(x, scores, keep, 2, fuse)
        assert torch.equal(ops.restore_tokens(tokens, kept, 38, 2, x), x)
        zeroed = ops.restore_tokens(tokens, kept, 38, 2, "zero")
        is_kept = torch.zeros(3, 40, 1, dtype=torch.bool, device=device)
        is_kept[:, :2] = True
        is_kept.scatter_(1, kept.unsqueeze(-1) + 2, True)
        assert torch.equal(zeroed, x.masked_fill(~is_kept, 0))
        if fuse:
            filled = ops.restore_tokens(tokens, kept, 38, 2)
            assert torch.equal(filled, torch.where(is_kept, x, tokens[:, -1:]))
        # Once more on what was restored: where a token is, it stays.
        places = ops.gather_tokens(zeroed, torch.cat([kept.new_tensor([[0, 1]]).expand(3, -1), kept + 2], 1))
        assert torch.equal(ops.restore_tokens(places, kept, 38, 2, "zero"), zeroed)


def test_round_trip_of_gradients(device: torch.device) -> None:
    """Restored with the tokens before dropping, every one of these has exactly one way to the result."""
    x = torch.randn(2, 30, 8, device=device, requires_grad=True)
    tokens, kept = ops.reorganize_tokens(x, torch.rand(2, 30, device=device), 11)
    weight = torch.randn(2, 30, 8, device=device)
    (grad,) = torch.autograd.grad(ops.restore_tokens(tokens, kept, 29, 1, x), x, weight)
    assert torch.equal(grad, weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_is_computed(device: torch.device, dtype: torch.dtype) -> None:
    """Inf, NaN and −0 go where they belong and nowhere else; what is ignored may be anything."""
    nan = float("nan")
    rows = [1.0, nan, -0.0, float("inf"), nan]
    tokens = torch.tensor(rows, dtype=dtype, device=device).view(1, 5, 1).repeat(2, 1, 9)
    kept = torch.tensor([[0, 2, 3], [1, 2, 5]], device=device)
    fill = torch.full((2, 7, 9), nan, dtype=dtype, device=device)
    fill[0, [2, 5, 6]] = 5.0
    fill[1, [1, 4, 5]] = 5.0
    expected = torch.tensor(
        [[1.0, nan, 5.0, -0.0, rows[3], 5.0, 5.0], [1.0, 5.0, nan, -0.0, 5.0, 5.0, rows[3]]], dtype=dtype
    )
    out = ops.restore_tokens(tokens, kept, 6, 1, fill)
    for channel in range(9):
        torch.testing.assert_close(out[..., channel].cpu(), expected, rtol=0, atol=0, equal_nan=True)
    assert torch.signbit(out[0, 3]).all()
    zeroed = ops.restore_tokens(tokens, kept, 6, 1, "zero")
    assert zeroed.isnan().sum() == 2 * 9 and zeroed[0, 2].eq(0).all()


def test_the_sum_of_gradients_rounds_once(device: torch.device) -> None:
    # 256 + 1 is 256 in bfloat16: added one by one in bfloat16 the ones would be lost.
    for num_patches in (70, 1500):
        tokens = torch.zeros(1, 2, 1, dtype=torch.bfloat16, device=device, requires_grad=True)
        kept = torch.tensor([[3]], device=device)
        weight = torch.ones(1, num_patches, 1, dtype=torch.bfloat16, device=device)
        weight[0, 0], weight[0, 3], weight[0, 65:] = 256.0, 1000.0, 0.0
        for function in (ops.restore_tokens, ops.reference.restore_tokens):
            (grad,) = torch.autograd.grad(function(tokens, kept, num_patches, 0), tokens, weight)
            assert grad.flatten().tolist() == [1000.0, 319.0 + 1.0]


def test_sums_do_not_depend_on_the_batch(device: torch.device) -> None:
    grad = torch.randn(5, 300, 70, device=device)
    kept = make(5, 40, 1, 299)[1].to(device)
    backward = torch.ops.evit.restore_tokens_backward
    whole = backward(grad, kept, 42, 1, True)
    for b in range(5):
        assert torch.equal(backward(grad[b : b + 1], kept[b : b + 1], 42, 1, True)[0], whole[b])
    strided = grad.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(backward(strided, kept, 42, 1, True), whole)


def test_scalars_reach_the_kernel(device: torch.device) -> None:
    tokens, kept = make(1, 29, 3, 50, 13)
    tokens, kept = tokens.to(device), kept.to(device)
    out = ops.restore_tokens(tokens, kept, 100003, 13, "zero")
    assert out.shape == (1, 100016, 3)
    assert torch.equal(out[:, :13], tokens[:, :13]) and out[:, 63:].eq(0).all()
    operator = torch.ops.evit.restore_tokens_backward
    assert operator(out, kept, 42, 13, False).shape == (1, 42, 3)
    # The fused token is told from the number of tokens; it gets zeros unless it filled.
    with_fused = operator(out + 1, kept, 43, 13, False)
    assert torch.equal(with_fused[:, :-1], tokens + 1) and with_fused[:, -1].eq(0).all()


def test_only_wanted_gradients_are_computed(device: torch.device) -> None:
    tokens, kept = (t.to(device) for t in make(2, 4, 5, 7, 1))
    fill = make_fill(2, 8, 5).to(device)
    for wants_tokens in (True, False):
        leaf = tokens if wants_tokens else fill
        leaf = leaf.clone().requires_grad_()
        out = ops.restore_tokens(*((leaf, kept, 7, 1, fill) if wants_tokens else (tokens, kept, 7, 1, leaf)))
        (grad,) = torch.autograd.grad(out.sum(), leaf)
        assert grad.sum() == 2 * 5 * (5 if wants_tokens else 3)


def test_many_patches(device: torch.device) -> None:
    """So many kept ones that a CUDA kernel searches among them."""
    for num_kept in (1500, 3500):
        tokens, kept = (t.to(device) for t in make(1, num_kept, 2, 4000))
        out = ops.restore_tokens(tokens, kept, 4000)
        assert torch.equal(out[:, 1:].gather(1, kept.unsqueeze(-1).expand(-1, -1, 2)), tokens[:, 1:-1])
        assert int((out == tokens[:, -1:]).all(dim=-1).sum()) == 4000 - num_kept
        grad = torch.randn(1, 4001, 2, dtype=torch.float64).to(device)
        actual = torch.ops.evit.restore_tokens_backward(grad, kept, num_kept + 2, 1, True)
        assert torch.equal(actual[:, 1:-1], grad[:, 1:].gather(1, kept.unsqueeze(-1).expand(-1, -1, 2)))
        others = torch.ones(4000, dtype=torch.bool, device=device)
        others[kept[0]] = False
        torch.testing.assert_close(actual[0, -1], grad[0, 1:][others].sum(dim=0), rtol=1e-11, atol=1e-11)
