"""PyTorch's attention in the place of the CPU's kernel where it runs on tiles; any dtype plays that here."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import timm
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import evit_ext
from evit_ext import ops
from evit_ext.cpu import forward as cpu_forward
from evit_ext.ops import library
from evit_ext.tokens.stage import find_stages

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not cpu_forward.SUPPORTED, reason="the portable kernels are not used by default"),
]


class Calls(TorchDispatchMode):
    """Counts operators by their names."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names[func.name()] += 1
        return func(*args, **kwargs or {})


def kernels(calls: Calls) -> int:
    return calls.names["evit::attention_with_scores"]


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    found: torch.dtype = request.param
    if found in library.TILED:
        pytest.skip(f"PyTorch's attention in {found} runs on this processor's tiles, whatever a test says")
    return found


def make(**arguments: Any) -> Any:
    torch.manual_seed(0)
    vit = timm.create_model("test_vit", img_size=64, num_classes=7, **arguments).eval()
    return evit_ext.apply(vit, keep_rate=0.6)


def run(vit: Any, x: Tensor, training: bool) -> tuple[list[Tensor], int]:
    with Calls() as calls, evit_ext.record_tokens(vit) as record:
        if training:
            loss = vit(x).float().square().sum()
            loss.backward()
            results = [vit.blocks[0].attn.qkv.weight.grad]
            vit.zero_grad()
        else:
            with torch.no_grad():
                results = [vit(x)]
    return [*results, *(kept.clone() for kept in record.kept)], kernels(calls)


@pytest.mark.parametrize("training", [False, True])
def test_models_run_pytorchs_attention(
    dtype: torch.dtype, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    vit, x = make().to(dtype), torch.randn(2, 3, 64, 64).to(dtype)
    before, called = run(vit, x, training)
    assert called == len(vit.blocks)
    monkeypatch.setattr(library, "TILED", frozenset({dtype}))
    after, called = run(vit, x, training)
    assert called == 0
    # Other roundings: at most 1.6e-6 and 2e-2 of the largest value were seen.
    tolerance = 5e-6 if dtype == torch.float32 else 5e-2
    for a, b in zip(after, before, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance * float(b.abs().max()))


def test_autocast_goes_by_its_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.bfloat16 in library.TILED:
        pytest.skip("this processor has tiles")
    monkeypatch.setattr(library, "TILED", frozenset({torch.bfloat16}))
    vit, x = make(), torch.randn(2, 3, 64, 64)
    with torch.no_grad(), Calls() as calls:
        vit(x)
    assert kernels(calls) == len(vit.blocks)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), Calls() as calls:
        vit(x)
    assert kernels(calls) == 0


def test_mean_scores_stay_on_the_kernel(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "TILED", frozenset({dtype}))
    vit = make(class_token=False, global_pool="avg").to(dtype)
    with torch.no_grad(), Calls() as calls:
        vit(torch.randn(2, 3, 64, 64).to(dtype))
    assert kernels(calls) == len(find_stages(vit)) < len(vit.blocks)


@pytest.mark.parametrize("biased", [False, True])
def test_the_operator(dtype: torch.dtype, biased: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    qkv, bias = torch.randn(2, 33, 3 * 48).to(dtype), torch.rand(2, 33) if biased else None
    out, scores = ops.attention_with_scores(qkv, 3, None, bias)
    monkeypatch.setattr(library, "TILED", frozenset({dtype}))
    with Calls() as calls:
        other, others = ops.attention_with_scores(qkv, 3, None, bias)
    assert kernels(calls) == 0 and calls.names["evit::class_attention"] == (0 if biased else 1)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(other, out, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(others, scores, rtol=1e-5, atol=1e-6)
