"""Training on the CPU: every attention and its gradient by our kernels, and where they must stand back."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.fx
import torch.nn.functional as F
from cpu_calls import compiling_is_exporting
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import evit_ext
from evit_ext.cpu import forward as cpu_forward
from evit_ext.cpu.forward import ACTIVE

pytestmark = pytest.mark.skipif(
    not cpu_forward.SUPPORTED, reason="the portable kernels are not used in models: they are no faster"
)

Build = Callable[..., Any]


def images(batch: int = 3) -> Tensor:
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def loss(vit: Any, x: Tensor) -> Tensor:
    return F.cross_entropy(vit(x).float(), torch.arange(len(x)))


def attentions(out: Tensor) -> tuple[int, int]:
    """How many of our and of PyTorch's attentions are in the graph that leads to `out`."""
    seen, left = set(), [out.grad_fn]
    while left:
        node = left.pop()
        if node is not None and node not in seen:
            seen.add(node)
            left += [before for before, _ in node.next_functions]
    names = [node.name() for node in seen]
    ours = sum("evit_attention_with_scores" in name for name in names)
    return ours, sum("ScaledDotProduct" in name for name in names)


def gradients(vit: Any, x: Tensor) -> list[Tensor]:
    vit.zero_grad()
    loss(vit, x).backward()
    return [parameter.grad.clone() for parameter in vit.parameters()]


def assert_close(actual: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for a, b in zip(actual, expected, strict=True):
        assert (a.double() - b.double()).norm() <= tolerance * b.double().norm().clamp(min=1e-6)


def as_timm_wrote_it(vit: Any) -> Any:
    """A copy whose attentions go through scaled_dot_product_attention."""
    vit = copy.deepcopy(vit)
    for block in vit.blocks:
        block.attn.__dict__[ACTIVE] = False
    return vit


def test_every_attention_is_ours(small_vit: Build) -> None:
    vit = evit_ext.apply(small_vit(), 0.7).train()
    assert attentions(loss(vit, images())) == (4, 0)
    exact = gradients(copy.deepcopy(vit).double(), images().double())
    assert attentions(loss(vit.double(), images().double())) == (0, 4)  # float64 is left to PyTorch
    # Relative norms: 1.9e-6 was the largest of ours, 2.2e-6 of timm's.
    assert_close(gradients(vit.float(), images()), exact, 5e-6)
    assert_close(gradients(as_timm_wrote_it(vit), images()), exact, 5e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_no_less_exact_than_pytorch(small_vit: Build, dtype: torch.dtype) -> None:
    vit = evit_ext.apply(small_vit(embed_dim=192, num_heads=3), 0.7).train().to(dtype)
    theirs = as_timm_wrote_it(vit)
    assert attentions(loss(vit, images().to(dtype))) == (4, 0)
    assert attentions(loss(theirs, images().to(dtype))) == (0, 4)
    # One block that does not reorganise: which patches are kept must not differ.
    x = torch.randn(4, 65, 192, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weights = torch.randn_like(x)
    exact = copy.deepcopy(theirs).double().blocks[0]
    grads = []
    for block, kind in ((exact, torch.float64), (vit.blocks[0], dtype), (theirs.blocks[0], dtype)):
        (block(x.to(dtype).to(kind)) * weights.to(dtype).to(kind)).sum().backward()
        grads.append(block.attn.qkv.weight.grad.double())
    errors = [((grad - grads[0]).norm() / grads[0].norm()).item() for grad in grads[1:]]
    assert errors[0] < 1.1 * errors[1]  # measured: 0.97, both


def test_checkpointing(small_vit: Build) -> None:
    vit = evit_ext.apply(small_vit(), 0.7).train()
    expected = gradients(vit, images())
    vit.set_grad_checkpointing()
    for a, b in zip(gradients(vit, images()), expected, strict=True):
        assert torch.equal(a, b)
    block = copy.deepcopy(vit.blocks[0])
    x = torch.randn(2, 17, 24)
    grads = []
    for run in (block, lambda x: checkpoint(block, x, use_reentrant=True)):
        leaf = x.clone().requires_grad_()
        # A loss whose gradient is the same whatever rounding does to the output, which is not the same:
        # a reentrant checkpoint's first forward is one without gradients, and goes through oneDNN.
        run(leaf).sum().backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)


def test_frozen_projection(small_vit: Build) -> None:
    """Also where the projection needs no gradient, and the tokens do."""
    vit = evit_ext.apply(small_vit(), 0.7).train()
    expected = gradients(vit, images())
    for block in vit.blocks:
        block.attn.qkv.requires_grad_(False)
    vit.zero_grad()
    loss(vit, images()).backward()
    for parameter, grad in zip(vit.parameters(), expected, strict=True):
        assert parameter.grad is None if not parameter.requires_grad else torch.equal(parameter.grad, grad)


def test_autocast(small_vit: Build) -> None:
    vit = evit_ext.apply(small_vit(), 0.7).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(vit, images())
    assert attentions(value) == (4, 0)
    value.backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in vit.parameters())


def test_dropout_goes_to_pytorch(small_vit: Build) -> None:
    vit = evit_ext.apply(small_vit(attn_drop_rate=0.1), 0.7)
    assert attentions(loss(vit.train(), images()))[0] == 0
    assert attentions(loss(vit.eval(), images())) == (4, 0)


def test_keep_rate_1_is_the_model_that_it_was(small_vit: Build) -> None:
    dense = small_vit()
    vit = evit_ext.apply(copy.deepcopy(dense), 0.7)
    evit_ext.set_keep_rate(vit, 1.0)
    assert attentions(loss(vit, images())) == (0, 4)
    for a, b in zip(gradients(vit, images()), gradients(dense, images()), strict=True):
        assert torch.equal(a, b)


def test_compiled_without_break(small_vit: Build) -> None:
    torch._dynamo.reset()
    vit = evit_ext.apply(small_vit(), 0.7).train()
    expected = gradients(vit, images())
    graphs: list[torch.fx.GraphModule] = []
    aot_eager = torch._dynamo.lookup_backend("aot_eager")

    def keep(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return aot_eager(graph, inputs)

    compiled = torch.compile(vit, backend=keep, fullgraph=True)
    vit.zero_grad()
    loss(compiled, images()).backward()
    assert_close([parameter.grad for parameter in vit.parameters()], expected, 1e-5)
    (graph,) = graphs
    ours = sum("attention_with_scores" in str(node.target) for node in graph.graph.nodes)
    assert ours == (0 if compiling_is_exporting() else 4)


def test_function_transforms_that_are_compiled(small_vit: Build) -> None:
    torch._dynamo.reset()
    vit = evit_ext.apply(small_vit(), 0.7).train()
    gradient = torch.func.grad(lambda x: vit(x).square().sum())
    compiled = torch.compile(gradient, backend="eager", fullgraph=True)
    assert_close([compiled(images())], [gradient(images())], 1e-5)


def test_traced_by_fx(small_vit: Build) -> None:
    """Of a block that stays as timm wrote it, which asks a traced value no more than its shape."""

    class Traced(nn.Module):
        def __init__(self, block: nn.Module) -> None:
            super().__init__()
            self.block = block

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.block(x)
            return out

    vit = evit_ext.apply(small_vit(), 0.7).train()
    x = torch.randn(2, 17, 24)
    traced = torch.fx.symbolic_trace(Traced(vit.blocks[0]))
    assert_close([traced(x)], [vit.blocks[0](x)], 1e-5)
