"""What only a GPU can show of the operators: streams, devices, graphs, no synchronisation, determinism."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from cuda_cases import OPERATORS, CalledOperators, Operator, assert_near, assert_same, run

from evit_ext import _C, ops
from evit_ext.ops import library

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="CUDA: torch.cuda.is_available() is False"
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
every_operator = pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.name)


def on(inputs: list[torch.Tensor], device: str = "cuda") -> list[torch.Tensor]:
    return [t.to(device) for t in inputs]


def test_the_build_has_kernels() -> None:
    assert _C.build_info()["cuda_operators"]
    assert _C.cuda_self_test(torch.cuda.current_device()) == ""
    assert library.runs_kernel(torch.ones(1, device="cuda"))


@every_operator
def test_the_kernel_runs_and_not_the_reference(operator: Operator) -> None:
    with CalledOperators() as called:
        run(operator, on(operator.inputs()))
    name = operator.name.removesuffix("_logsumexp").removesuffix("_dropping").removesuffix("_filling")
    assert name in called.names
    backward = {"gather_tokens": "scatter_tokens", "scatter_tokens": "gather_tokens"}.get(
        operator.name, "scatter_tokens" if operator.name.endswith("_dropping") else f"{name}_backward"
    )
    assert not operator.leaves or backward in called.names


@every_operator
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", [1, 4, 1024])
def test_agrees_with_the_cpu(operator: Operator, dtype: torch.dtype, batch: int) -> None:
    """The kept patches exactly; values to some roundings."""
    inputs = operator.inputs(batch, dtype)
    assert_near(run(operator, on(inputs)), run(operator, inputs))


@every_operator
def test_agrees_with_the_float64_reference(operator: Operator) -> None:
    inputs = on(operator.inputs(8))
    exact = [t.double() if t.is_floating_point() else t for t in inputs]
    assert_near(run(operator, inputs), run(operator, exact, operator.reference))


@every_operator
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_runs_on_the_current_stream(operator: Operator, dtype: torch.dtype) -> None:
    """On another stream than the inputs' producer, a kernel would read zeros."""
    inputs = on(operator.inputs(dtype=dtype))
    expected = run(operator, inputs)  # also loads the kernels, which may wait for the device
    torch.cuda.synchronize()
    zeros = run(operator, operator.blank(inputs))
    assert not all(torch.equal(a, b) for a, b in zip(zeros, expected, strict=True))
    stream = torch.cuda.Stream()
    buffers = operator.blank(inputs)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(1_000_000_000)  # cycles: some 500 ms, far longer than the launches take
        for buffer, value in zip(buffers, inputs, strict=True):
            buffer.copy_(value)
        result = run(operator, buffers)
        assert not stream.query(), "the stream was waited for, or the delay was too short to tell"
    stream.synchronize()
    assert_same(result, expected)


@every_operator
def test_runs_on_the_device_of_its_tensors(operator: Operator) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("CUDA: there is one device, a second is needed")
    inputs = operator.inputs()
    assert torch.cuda.current_device() == 0
    result = run(operator, on(inputs, "cuda:1"))
    assert torch.cuda.current_device() == 0
    assert {t.device.index for t in result} == {1}
    assert_near(result, run(operator, inputs))


def test_leaves_a_device_alone_that_is_not_used() -> None:
    """Setting back the current device of a thread that never chose one would create a context on cuda:0."""
    if torch.cuda.device_count() < 2:
        pytest.skip("CUDA: there is one device, a second is needed")
    code = """
import threading, torch
from evit_ext import ops
x, index = torch.randn(1, 4, 8, device="cuda:1"), torch.zeros(1, 2, dtype=torch.int64, device="cuda:1")
thread = threading.Thread(target=lambda: ops.gather_tokens(x, index))
thread.start(), thread.join()
assert torch._C._cuda_hasPrimaryContext(1) and not torch._C._cuda_hasPrimaryContext(0)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@every_operator
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_in_a_cuda_graph(operator: Operator, dtype: torch.dtype) -> None:
    """Forward and backward in one graph, replayed with other values; it allocates and waits for nothing."""
    static = on(operator.inputs(seed=0, dtype=dtype))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run(operator, static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = run(operator, static)
    for seed in (1, 2, 0):
        inputs = on(operator.inputs(seed=seed, dtype=dtype))
        for buffer, value in zip(static, inputs, strict=True):
            buffer.copy_(value)
        graph.replay()
        torch.cuda.synchronize()
        assert_same(captured, run(operator, inputs))


@pytest.fixture
def no_synchronization() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


@every_operator
def test_never_waits_for_the_device(operator: Operator, no_synchronization: None) -> None:
    inputs = on(operator.inputs())
    run(operator, inputs)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    run(operator, inputs)


@every_operator
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_run_gives_the_same_bits(operator: Operator, dtype: torch.dtype) -> None:
    inputs = on(operator.inputs(64, dtype))
    first = run(operator, inputs)
    side = torch.cuda.Stream()
    load = torch.randn(2048, 2048, device="cuda")
    torch.cuda.synchronize()
    for repeat in range(30):
        if repeat >= 15:  # with something else on the device, the blocks come in another order
            with torch.cuda.stream(side):
                load @ load
        assert_same(run(operator, inputs), first)


@every_operator
def test_does_not_depend_on_the_batch(operator: Operator) -> None:
    """An entry's result is the same bits, alone or among others."""
    inputs = on(operator.inputs(300))
    whole = run(operator, inputs)[0]
    for entry in (0, 17, 299):
        alone = [t[entry : entry + 1] if t.shape[0] == 300 else t for t in inputs]
        assert torch.equal(run(operator, alone)[0][0], whole[entry])


@pytest.mark.parametrize("tokens", [2, 3, 33, 197, 1025, 4097, 16385, 65536])
@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("scores_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_number_of_tokens(tokens: int, fuse: bool, scores_dtype: torch.dtype) -> None:
    """Rounded to bfloat16, most scores of many tokens are ties."""
    x = torch.randn(2, tokens, 24)
    scores = torch.rand(2, tokens).to(scores_dtype)
    for keep in sorted({1, max(1, tokens // 3), max(1, tokens - 2)}):
        actual = ops.reorganize_tokens(x.cuda(), scores.cuda(), keep, fuse=fuse)
        expected = ops.reorganize_tokens(x, scores, keep, fuse=fuse)
        assert torch.equal(actual[1].cpu(), expected[1])
        exact = ops.reference.reorganize_tokens(x.double(), scores.double(), keep, fuse=fuse)[0]
        # The fused token is a sum of up to `tokens` terms: 4.3e-8 times their number was seen on the CPU.
        error = (actual[0].cpu().double() - exact).abs().amax(dim=(0, 2))
        kept = error[: 1 + keep]
        assert kept.eq(0).all()
        assert error.max() <= 1e-7 * (tokens + 32)


@pytest.mark.parametrize("tokens", [2, 33, 197, 1024, 1025, 4097, 65536])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_number_of_restored_tokens(tokens: int, dtype: torch.dtype) -> None:
    patches = tokens - 1
    for keep in sorted({0, patches // 3, patches - 1}):
        kept = torch.rand(2, patches).argsort(dim=1)[:, :keep].sort(dim=1).values
        x = torch.randn(2, keep + 2, 24).to(dtype)
        out = ops.restore_tokens(x.cuda(), kept.cuda(), patches)
        assert torch.equal(out.cpu(), ops.reference.restore_tokens(x, kept, patches))
        grad = torch.randn(2, tokens, 24).to(dtype)
        actual = torch.ops.evit.restore_tokens_backward(grad.cuda(), kept.cuda(), keep + 2, 1, True).cpu()
        expected = torch.ops.evit.restore_tokens_backward(grad.double(), kept, keep + 2, 1, True)
        assert torch.equal(actual[:, :-1].double(), expected[:, :-1])
        # The sum of up to `tokens` terms in float32, rounded once.
        error = (actual[:, -1].double() - expected[:, -1]).abs().max()
        rounding = 0 if dtype == torch.float32 else 2**-8 * float(expected[:, -1].abs().max())
        assert error <= 1e-7 * (tokens + 32) + rounding


@pytest.mark.parametrize("tokens", [1, 2, 31, 197, 4097, 65536])
@pytest.mark.parametrize("channels", [1, 20, 64, 80, 128])
def test_class_attention_of_any_number_of_tokens(tokens: int, channels: int) -> None:
    q, k = torch.randn(2, 2, channels), torch.randn(2, 2, tokens, channels)
    scores = ops.class_attention(q.cuda(), k.cuda())
    expected = ops.reference.class_attention(q.double(), k.double())
    torch.testing.assert_close(scores.cpu().double(), expected, rtol=2e-5, atol=1e-9)


@pytest.mark.parametrize("channels", [1, 7, 384, 768, 1000, 4096, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_number_of_channels(channels: int, dtype: torch.dtype) -> None:
    x = torch.randn(2, 70, channels).to(dtype)
    branch = torch.randn(2, 70, channels).to(dtype)
    scores = torch.randn(2, 69).softmax(dim=1)
    index = torch.randint(0, 70, (2, 30))
    kept = torch.rand(2, 80).argsort(dim=1)[:, :68].sort(dim=1).values
    weight, bias = torch.randn(channels).to(dtype), torch.randn(channels).to(dtype)

    def everything(device: str) -> list[torch.Tensor]:
        a, b, s, i, j, w, v = (t.to(device) for t in (x, branch, scores, index, kept, weight, bias))
        with torch.no_grad():
            return [
                ops.gather_tokens(a, i),
                ops.scatter_tokens(a[:, :30], i, 70),
                ops.fuse_tokens(a, s.new_ones(2, 70), i),
                *ops.reorganize_tokens(a, s, 30),
                ops.restore_tokens(a, j, 80),
                torch.ops.evit.restore_tokens_backward(torch.cat([a, b], 1)[:, :81], j, 70, 1, True),
                # With few channels, the variance may be tiny: a large eps keeps the quotient in bounds.
                *ops.add_reorganize_norm(a, b, s, 30, w, v, eps=0.1),
            ]

    assert_near(everything("cuda"), everything("cpu"))


def test_unaligned_rows() -> None:
    """Rows that begin at addresses for which no wide load is allowed."""
    for offset in range(1, 5):
        storage = torch.randn(2 * 40 * 384 + offset).bfloat16()
        x = storage[offset:].view(2, 40, 384)
        scores = torch.rand(2, 40)
        on_gpu = storage.cuda()[offset:].view(2, 40, 384)
        actual = ops.reorganize_tokens(on_gpu, scores.cuda(), 9)
        assert_near(list(actual), list(ops.reorganize_tokens(x, scores, 9)))
        kept = torch.arange(1, 77, 2).expand(2, -1)
        restored = ops.restore_tokens(on_gpu, kept.cuda(), 100)
        assert torch.equal(restored.cpu(), ops.restore_tokens(x, kept, 100))
        heads = x.view(2, 40, 6, 64).transpose(1, 2)
        heads_gpu = on_gpu.view(2, 40, 6, 64).transpose(1, 2)
        near = ops.class_attention(heads_gpu[:, :, 0], heads_gpu)
        assert_near([near], [ops.class_attention(heads[:, :, 0], heads)])


def test_more_blocks_than_one_dimension_of_a_grid_has() -> None:
    """65,535 is the limit of a grid's second and third dimension."""
    batch = 70_000
    x, scores = torch.randn(batch, 6, 4, device="cuda"), torch.rand(batch, 5, device="cuda")
    actual = ops.reorganize_tokens(x, scores, 2)
    assert_near(list(actual), list(ops.reference.reorganize_tokens(x, scores, 2)))
    restored = ops.restore_tokens(*actual, 5)
    assert torch.equal(restored, ops.reference.restore_tokens(*actual, 5))
    q, k = torch.randn(batch, 1, 4, device="cuda"), torch.randn(batch, 1, 3, 4, device="cuda")
    assert_near([ops.class_attention(q, k)], [ops.reference.class_attention(q, k)])
    index = torch.randint(0, 6, (batch, 2), device="cuda")
    assert torch.equal(ops.gather_tokens(x, index), ops.reference.gather_tokens(x, index))
    wide = torch.randn(1, batch, 4, device="cuda")
    order = torch.randperm(batch, device="cuda").unsqueeze(0)
    assert torch.equal(ops.scatter_tokens(ops.gather_tokens(wide, order), order, batch), wide)
