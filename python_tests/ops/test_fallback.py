"""Where an operator has no kernel or its gradient does not suffice, the reference runs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from evit_ext import models, ops
from evit_ext.ops import library


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every device stand for one that nothing was built for, where calling an operator fails."""

    def called(*_: object) -> None:
        raise AssertionError("an operator without a kernel was called")

    class NoOperators:
        def __getattr__(self, name: str) -> object:
            return called

    monkeypatch.setattr(library, "KERNEL_DEVICES", frozenset())
    monkeypatch.setattr(torch.ops, "evit", NoOperators())


def test_operators_run_their_reference(device: torch.device, no_kernels: None) -> None:
    q, k = torch.randn(2, 3, 4).to(device), torch.randn(2, 3, 9, 4).to(device)
    x, index = torch.randn(2, 9, 5).to(device).requires_grad_(), torch.tensor([[0, 8], [3, 3]], device=device)
    scores = ops.class_attention(q, k)
    assert torch.equal(scores, ops.reference.class_attention(q, k))
    logsumexp = torch.rand(2, 3).to(device)
    assert torch.equal(
        ops.class_attention(q, k, 1.0, logsumexp), ops.reference.class_attention(q, k, 1.0, logsumexp)
    )
    for name, arguments in {
        "gather_tokens": (x, index),
        "scatter_tokens": (x[:, :2], index, 9),
        "fuse_tokens": (x, scores, index),
        "merge_tokens": (x, index, 9, None, 7),
        "bipartite_matching": (k, 6),
        "reorganize_tokens": (x, scores, 3),
        "restore_tokens": (x[:, :4], torch.tensor([[0, 8], [3, 4]], device=device), 9),
        "add_reorganize_norm": (x, x, scores, 3),
        "attention_with_scores": (torch.randn(2, 9, 24).to(device), 2, None, scores, True),
    }.items():
        result = getattr(ops, name)(*arguments)
        expected = getattr(ops.reference, name)(*arguments)
        for a, b in zip(
            result if isinstance(result, tuple) else [result],
            expected if isinstance(expected, tuple) else [expected],
            strict=True,
        ):
            assert torch.equal(a, b)
    # In blocks of queries, without the map.
    torch.testing.assert_close(ops.mean_attention(k, k), ops.reference.mean_attention(k, k))
    torch.cat([ops.gather_tokens(x, index), ops.reorganize_tokens(x, scores, 3)[0]], dim=1).sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0


def test_a_model_computes_the_same(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    model = (
        models.deit_tiny(keep_rate=0.6, img_size=64, depth=4, drop_loc=(1, 2, 3)).double().to(device).eval()
    )
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64).to(device)
    with_kernels = model(images)
    request.getfixturevalue("no_kernels")
    torch.testing.assert_close(model(images), with_kernels, rtol=1e-12, atol=1e-12)


def test_reference_is_exact_under_autocast(device: torch.device, no_kernels: None) -> None:
    q, k = torch.randn(2, 3, 16).to(device), torch.randn(2, 3, 50, 16).to(device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        scores = ops.class_attention(q, k)
    assert scores.dtype == torch.float32
    exact = ops.reference.class_attention(q.bfloat16().double(), k.bfloat16().double())
    torch.testing.assert_close(scores.double(), exact, rtol=1e-5, atol=1e-9)


def functions(
    device: torch.device,
) -> dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], Tensor]]:
    """Operator and reference as functions of one float64 tensor, and a value for it."""
    k = torch.randn(2, 3, 5, 4, dtype=torch.float64).to(device)
    index = torch.tensor([[1, 0, 4], [2, 2, 3]], device=device)
    kept = torch.tensor([[0, 2, 3], [1, 2, 3]], device=device)
    q = torch.randn(2, 3, 4, dtype=torch.float64).to(device)
    x = torch.randn(2, 5, 3, dtype=torch.float64).to(device)
    scores = torch.rand(2, 5, dtype=torch.float64).to(device)
    calls: dict[str, tuple[Callable[[Any, Tensor], Tensor], Tensor]] = {
        "class_attention": (lambda o, t: o.class_attention(t, k), q),
        "class_attention, logsumexp": (
            lambda o, t: o.class_attention(
                t, k, 1.0, torch.einsum("bhd,bhnd->bhn", t.detach(), k).logsumexp(2)
            ),
            q,
        ),
        "gather_tokens": (lambda o, t: o.gather_tokens(t, index), x),
        "scatter_tokens": (lambda o, t: o.scatter_tokens(t, index, 6), x[:, :3]),
        "fuse_tokens": (lambda o, t: o.fuse_tokens(t, t[:, :, 0], index), x),
        "merge_tokens": (
            lambda o, t: o.merge_tokens(t, index, 5, t[:, 2:, 0].exp(), 2)[0],
            x,
        ),
        "merge_tokens, totals": (lambda o, t: o.merge_tokens(x, index, 5, t[:, 2:, 0] ** 2, 2)[1], x),
        "reorganize_tokens": (lambda o, t: o.reorganize_tokens(t, scores, 2)[0] * t.sum(), x),
        "restore_tokens": (lambda o, t: o.restore_tokens(t, kept, 6) * t.sum(), x),
        "restore_tokens, tensor": (lambda o, t: o.restore_tokens(x, kept, 4, 1, t), x),
        "add_reorganize_norm": (lambda o, t: o.add_reorganize_norm(t, x, scores, 2, t[0, 0])[1], x),
        "mean_attention": (lambda o, t: o.mean_attention(t.unsqueeze(2), k), q),
        "attention_with_scores, bias": (
            lambda o, t: torch.cat(
                [a.flatten() for a in o.attention_with_scores(k.flatten(1)[:, :60].view(2, 5, 12), 2, 1.0, t)]
            ),
            scores,
        ),
        "attention_with_scores": (
            lambda o, t: torch.cat(
                [a.flatten() for a in o.attention_with_scores(t.flatten().repeat(6).view(2, 5, 18), 2)]
            ),
            x,
        ),
    }
    return {name: (partial(f, ops), partial(f, ops.reference), value) for name, (f, value) in calls.items()}


@pytest.mark.parametrize("name", list(functions(torch.device("cpu"))))
def test_forward_mode_and_torch_func(name: str, device: torch.device) -> None:
    operator, reference, value = functions(device)[name]
    direction = torch.randn(value.shape, dtype=value.dtype).to(device)
    expected = torch.func.jvp(reference, (value,), (direction,))[1]
    assert expected.abs().max() > 0
    assert torch.equal(torch.func.jvp(operator, (value,), (direction,))[1], expected)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(operator(forward_ad.make_dual(value, direction))).tangent
    # LayerNorm's forward mode is another formula in torch.func.
    torch.testing.assert_close(tangent, expected, rtol=1e-12, atol=1e-12)
    batch = torch.stack([value, -value])
    torch.testing.assert_close(torch.vmap(operator)(batch), torch.stack([reference(v) for v in batch]))
    second = torch.func.hessian(lambda t: operator(t).square().sum())(value)
    torch.testing.assert_close(second, torch.func.hessian(lambda t: reference(t).square().sum())(value))


@pytest.mark.parametrize("name", ["class_attention", "attention_with_scores", "reorganize_tokens"])
def test_function_transforms_that_are_compiled(name: str, device: torch.device) -> None:
    torch._dynamo.reset()
    operator, reference, value = functions(device)[name]
    compiled = torch.compile(
        torch.func.grad(lambda t: operator(t).sin().sum()), fullgraph=True, backend="eager"
    )
    expected = torch.func.grad(lambda t: reference(t).sin().sum())(value)
    torch.testing.assert_close(compiled(value), expected)
    # And one that was compiled before there was a transform.
    compiled = torch.compile(operator, backend="eager")
    batch = torch.stack([value, -value])
    for _ in range(2):
        torch.testing.assert_close(compiled(value), reference(value))
        torch.testing.assert_close(torch.vmap(compiled)(batch), torch.stack([reference(v) for v in batch]))


@pytest.mark.parametrize("name", ["class_attention", "fuse_tokens", "merge_tokens", "reorganize_tokens"])
def test_second_derivative_is_refused(name: str, device: torch.device) -> None:
    if device.type not in library.KERNEL_DEVICES:
        pytest.skip("no kernels, and the reference is differentiable any number of times")
    operator, _, value = functions(device)[name]
    value.requires_grad_()
    loss = operator(value).square().sum()
    (grad,) = torch.autograd.grad(loss, value, create_graph=True)
    with pytest.raises(RuntimeError, match=f"evit_ext.ops.{name} is differentiable once; for higher"):
        grad.square().sum().backward()


def test_index_may_be_mapped_over(device: torch.device) -> None:
    x, index = torch.randn(4, 2, 7, 3).to(device), torch.randint(0, 7, (4, 2, 3)).to(device)
    mapped = torch.vmap(ops.gather_tokens)(x, index)
    assert torch.equal(mapped, torch.stack([ops.gather_tokens(a, b) for a, b in zip(x, index, strict=True)]))
    kept = torch.tensor([[0, 2, 3, 6, 7], [1, 2, 3, 4, 5]], device=device).expand(4, 2, 5)
    mapped = torch.vmap(lambda t, k: ops.restore_tokens(t, k, 8))(x, kept)
    assert torch.equal(mapped, torch.stack([ops.restore_tokens(t, kept[0], 8) for t in x]))
