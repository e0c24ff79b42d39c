"""The CUDA kernel of attention_with_scores on a GPU, next to PyTorch's attention and class_attention.

The operator is called directly: the function of the same name does not use it unless it is told to.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cuda_cases import CalledOperators, assert_near, assert_same
from torch import Tensor

from evit_ext import ops
from evit_ext.ops import library

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA: torch.cuda.is_available() is False"),
    pytest.mark.skipif("cuda" not in library.KERNEL_DEVICES, reason="the build has no CUDA kernels"),
]

every_dtype = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
every_width = pytest.mark.parametrize("channels", [32, 64, 128])


def make(batch: int, tokens: int, heads: int, channels: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    shape = (batch, tokens, 3 * heads * channels)
    return torch.randn(shape, generator=generator, device="cuda", dtype=dtype)


def kernel(qkv: Tensor, heads: int) -> list[Tensor]:
    scale = (qkv.shape[2] // (3 * heads)) ** -0.5
    return list(torch.ops.evit.attention_with_scores(qkv, heads, scale))


@every_dtype
@every_width
@pytest.mark.parametrize("tokens", [0, 1, 2, 15, 16, 17, 63, 64, 65, 138, 197, 577, 1025, 4097])
def test_agrees_with_the_float64_reference(dtype: torch.dtype, channels: int, tokens: int) -> None:
    qkv = make(2, tokens, 3, channels, dtype)
    out, scores = kernel(qkv, 3)
    exact = ops.reference.attention_with_scores(qkv.double(), 3)
    assert_near([out, scores], list(exact))


@every_dtype
@every_width
@pytest.mark.parametrize("batch", [1, 8, 256])
def test_agrees_with_pytorch_and_class_attention(dtype: torch.dtype, channels: int, batch: int) -> None:
    qkv = make(batch, 197, 6, channels, dtype)
    out, scores = kernel(qkv, 6)
    q, k, v = ops.reference.unpacked(qkv, 6)
    attention = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    # Both round probabilities, and the result once more.
    torch.testing.assert_close(out, attention, rtol=0, atol=8 * torch.finfo(dtype).eps * float(out.std()))
    torch.testing.assert_close(scores, ops.class_attention(q[:, :, 0], k), rtol=1e-5, atol=1e-8)


@every_dtype
def test_nan_and_inf(dtype: torch.dtype) -> None:
    for bad in (float("nan"), float("inf"), float("-inf")):
        for place in (slice(0, 1), slice(0, 40), slice(0, 70), slice(66, 70)):
            qkv = make(2, 70, 2, 64, dtype)
            qkv[:, :, 0] = 1.0
            qkv[0, place, 128] = bad  # keys of the first head
            out, scores = kernel(qkv, 2)
            exact = ops.reference.attention_with_scores(qkv.double(), 2)
            for actual, expected in zip((out, scores), exact, strict=True):
                assert torch.equal(actual.isnan(), expected.isnan())
            assert_near([out.nan_to_num(), scores.nan_to_num()], [t.nan_to_num() for t in exact])


@every_dtype
def test_does_not_depend_on_the_batch_or_the_place(dtype: torch.dtype) -> None:
    """The batch decides how many queries a block takes; the place, whether rows are copied first."""
    qkv = make(300, 197, 3, 64, dtype)
    whole = kernel(qkv, 3)
    for entry in (0, 17, 299):
        assert_same(kernel(qkv[entry : entry + 1], 3), [t[entry : entry + 1] for t in whole])
    moved = torch.empty(qkv.numel() + 1, dtype=dtype, device="cuda")[1:].view(qkv.shape).copy_(qkv)
    assert_same(kernel(moved, 3), whole)
    wide = torch.empty(300, 197, qkv.shape[2] + 64, dtype=dtype, device="cuda")[:, :, 64:].copy_(qkv)
    assert_same(kernel(wide, 3), whole)


@every_dtype
def test_every_run_gives_the_same_bits(dtype: torch.dtype) -> None:
    qkv = make(64, 197, 6, 64, dtype)
    first = kernel(qkv, 6)
    side = torch.cuda.Stream()
    load = torch.randn(2048, 2048, device="cuda")
    torch.cuda.synchronize()
    for repeat in range(30):
        if repeat >= 15:  # with something else on the device, the blocks come in another order
            with torch.cuda.stream(side):
                load @ load
        assert_same(kernel(qkv, 6), first)


def test_in_a_cuda_graph() -> None:
    static = make(4, 197, 6, 64, torch.bfloat16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        kernel(static, 6)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = kernel(static, 6)
    for seed in (1, 2):
        static.copy_(make(4, 197, 6, 64, torch.bfloat16, seed))
        graph.replay()
        torch.cuda.synchronize()
        assert_same(captured, kernel(static, 6))


def test_more_blocks_than_one_dimension_of_a_grid_has() -> None:
    qkv = make(70_000, 3, 1, 32, torch.bfloat16)
    exact = ops.reference.attention_with_scores(qkv.double(), 1)
    assert_near(kernel(qkv, 1), list(exact))


@every_dtype
def test_runs_where_it_is_asked_for(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    qkv = make(2, 50, 3, 64, dtype)
    for wanted in (False, True):
        monkeypatch.setattr(library, "CUDA_ATTENTION", wanted)
        with CalledOperators() as called, torch.no_grad():
            result = ops.attention_with_scores(qkv, 3)
        assert ("attention_with_scores" in called.names) == wanted
        assert_near(list(result), list(ops.reference.attention_with_scores(qkv.double(), 3)))


def test_refuses_what_it_does_not_take() -> None:
    for dtype, channels in ((torch.float32, 64), (torch.bfloat16, 48), (torch.float16, 256)):
        with pytest.raises(RuntimeError, match="on CUDA takes float16 and bfloat16 with 32, 64 or 128"):
            kernel(make(1, 9, 2, channels, dtype), 2)
