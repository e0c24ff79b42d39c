"""Models on a GPU: compiled with CUDA graphs, under autocast, without waiting for the device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cuda_cases import CalledOperators
from torch import Tensor
from torch._dynamo.utils import counters

import evit_ext

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="CUDA: torch.cuda.is_available() is False"
)


def images(batch: int = 3, seed: int = 0) -> Tensor:
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(seed)).cuda()


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def test_agrees_with_the_cpu(small_vit: Any) -> None:
    vit = evit_ext.apply(small_vit(dtype=torch.float64), (0.7, 0.6, 0.5))
    with evit_ext.record_tokens(vit) as record:
        expected = vit(images().cpu().double())
        kept = list(record.kept)
        actual = vit.cuda()(images().double())
        assert [a.cpu().tolist() for a in record.kept] == [b.tolist() for b in kept]
    torch.testing.assert_close(actual.cpu(), expected, rtol=1e-10, atol=1e-11)


def test_uses_the_kernels(small_vit: Any) -> None:
    vit = evit_ext.apply(small_vit().cuda(), 0.6)
    for training in (False, True):
        with CalledOperators() as called, torch.set_grad_enabled(training):
            vit.train(training)(images())
        assert "class_attention" in called.names
        assert called.names & {"reorganize_tokens", "add_reorganize_norm"}


def test_compiled_with_cuda_graphs(small_vit: Any, fresh_compiler: None) -> None:
    vit = evit_ext.apply(small_vit().cuda(), 0.6)
    compiled = torch.compile(vit, fullgraph=True, mode="reduce-overhead")
    with torch.no_grad():
        for seed in range(4):  # the first records, the later ones replay
            torch.compiler.cudagraph_mark_step_begin()
            logits = compiled(images(seed=seed)).clone()
            torch.testing.assert_close(logits, vit(images(seed=seed)), rtol=1e-4, atol=1e-4)
    assert counters["inductor"]["cudagraph_skips"] == 0


def test_training_compiled_with_cuda_graphs(small_vit: Any, fresh_compiler: None) -> None:
    vit = evit_ext.apply(small_vit().cuda().train(), 0.6)
    compiled = torch.compile(vit, fullgraph=True, mode="reduce-overhead")
    for seed in range(4):
        gradients = []
        for model in (compiled, vit):
            vit.zero_grad(set_to_none=True)
            torch.compiler.cudagraph_mark_step_begin()
            model(images(seed=seed)).square().sum().backward()
            gradients.append([p.grad.clone() for p in vit.parameters() if p.grad is not None])
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * float(b.abs().max()))
    assert counters["inductor"]["cudagraph_skips"] == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(small_vit: Any, dtype: torch.dtype) -> None:
    """Kept as in the same network in float32: rounding may exchange patches that count nearly the same."""
    vit = evit_ext.apply(small_vit().cuda(), 0.6).train()
    expected = vit(images(16))
    with evit_ext.record_tokens(vit) as record, torch.autocast("cuda", dtype=dtype):
        logits = vit(images(16))
    assert logits.dtype == dtype and all(scores.dtype == torch.float32 for scores in record.scores)
    assert torch.nn.functional.cosine_similarity(logits.float(), expected).mean() > 0.95
    logits.float().square().sum().backward()
    for name, parameter in vit.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.dtype == torch.float32


def test_a_model_in_bfloat16(small_vit: Any) -> None:
    vit = small_vit().cuda()
    expected = evit_ext.apply(vit, 0.6)(images(16))
    logits = vit.bfloat16()(images(16).bfloat16())
    assert logits.dtype == torch.bfloat16
    assert torch.nn.functional.cosine_similarity(logits.float(), expected).mean() > 0.95


def test_in_a_cuda_graph(small_vit: Any) -> None:
    vit = evit_ext.apply(small_vit().cuda(), 0.6)
    captured = evit_ext.cuda_graph(vit, images())
    results = [captured(images(seed=seed)) for seed in (1, 2)]
    for seed in (3, 4):  # on streams of their own, which take turns
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            results.append(captured(images(seed=seed)))
    torch.cuda.synchronize()
    with torch.no_grad():
        for seed, result in enumerate(results, 1):
            torch.testing.assert_close(result, vit(images(seed=seed)), rtol=1e-4, atol=1e-4)
        for parameter in vit.parameters():
            parameter.mul_(1.1)
        torch.testing.assert_close(captured(images()), vit(images()), rtol=1e-4, atol=1e-4)
    evit_ext.set_keep_rate(vit, 0.5)
    with pytest.raises(RuntimeError, match="the keep rate, or the rule"):
        captured(images())


def test_never_waits_for_the_device(small_vit: Any) -> None:
    vit = evit_ext.apply(small_vit().cuda(), 0.6).train()
    batch = images()
    vit(batch).square().sum().backward()
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        vit(batch).square().sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
