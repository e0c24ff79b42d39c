"""A reorganising block without gradients: sum, reorganisation and norm as one operator, where that fits."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from timm.layers import LayerNorm, RmsNorm

import evit_ext
from evit_ext.ops import library
from evit_ext.patching import block as block_module

pytestmark = pytest.mark.usefixtures("one_thread")


def images(batch: int = 3, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, 32, 32, dtype=dtype, generator=generator)


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The num_keep of every call of the operator that is sum, reorganisation and norm at once."""
    calls: list[int] = []
    operator = evit_ext.ops.add_reorganize_norm

    def spy(*args: Any, **kwargs: Any) -> Any:
        calls.append(args[3])
        return operator(*args, **kwargs)

    monkeypatch.setattr(evit_ext.ops, "add_reorganize_norm", spy)
    return calls


def run_both_ways(vit: Any, x: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> tuple[torch.Tensor, ...]:
    """Logits and records without gradients: as the block decides, and with the three steps one by one."""
    results = []
    for separate in (False, True):
        with monkeypatch.context() as patch, torch.no_grad(), evit_ext.record_tokens(vit) as record:
            if separate:
                patch.setattr(block_module, "_norms_as_written", lambda *args: False)
            torch.manual_seed(3)
            results += [vit(x), torch.cat([k.flatten() for k in record.kept])]
    return tuple(results)


@pytest.mark.parametrize("fuse", [True, False])
def test_without_gradients_one_operator_does_three_steps(
    variant: Any, fuse: bool, device: torch.device, at_once: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    vit = evit_ext.apply(variant(dtype=torch.float64).to(device), 0.6, (1, 2), fuse)
    x = images(dtype=torch.float64).to(device)
    logits, kept, expected, expected_kept = run_both_ways(vit, x, monkeypatch)
    assert at_once == [10, 7 if fuse else 6]
    torch.testing.assert_close(logits, expected, rtol=1e-11, atol=1e-12)
    assert torch.equal(kept, expected_kept)
    with torch.inference_mode():
        assert torch.equal(vit(x), logits)
    assert len(at_once) == 4


def test_gradients_take_the_separate_steps(small_vit: Any, device: torch.device, at_once: list[int]) -> None:
    vit = evit_ext.apply(small_vit().to(device), 0.6)
    x = images().to(device)
    vit(x).sum().backward()
    vit.requires_grad_(False)
    x.requires_grad_()
    vit(x).sum().backward()
    assert x.grad is not None and at_once == []


@pytest.mark.parametrize(
    "norm",
    [
        partial(LayerNorm, eps=1e-2),
        partial(torch.nn.LayerNorm, eps=1e-2),
        partial(torch.nn.LayerNorm, bias=False),
        partial(torch.nn.LayerNorm, elementwise_affine=False),
    ],
)
def test_layer_norms_that_are_part_of_the_operator(
    small_vit: Any, norm: Any, device: torch.device, at_once: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    vit = evit_ext.apply(small_vit(norm_layer=norm, dtype=torch.float64).to(device), 0.6, [1])
    logits, _, expected, _ = run_both_ways(vit, images(dtype=torch.float64).to(device), monkeypatch)
    assert at_once == [10]
    torch.testing.assert_close(logits, expected, rtol=1e-11, atol=1e-12)


def count_global_calls(norm: Any, seen: list[str]) -> Callable[[], None]:
    hook = torch.nn.modules.module.register_module_forward_hook(
        lambda module, args, out: seen.append("global") if module is norm else None
    )
    return hook.remove


def replace_forward(norm: Any, seen: list[str]) -> Callable[[], None]:
    norm.forward = lambda x: seen.append("forward") or type(norm).forward(norm, x)
    return lambda: delattr(norm, "forward")


@pytest.mark.parametrize(
    "watch",
    [
        lambda norm, seen: norm.register_forward_hook(lambda *args: seen.append("after")).remove,
        lambda norm, seen: norm.register_forward_pre_hook(lambda *args: seen.append("before")).remove,
        lambda norm, seen: (
            norm.register_forward_hook(lambda *args, **kwargs: seen.append("kwargs"), with_kwargs=True).remove
        ),
        count_global_calls,
        replace_forward,
    ],
    ids=["hook", "pre-hook", "hook with kwargs", "global hook", "forward replaced"],
)
def test_who_watches_the_norm_sees_it_called(
    small_vit: Any, watch: Any, device: torch.device, at_once: list[int]
) -> None:
    vit = evit_ext.apply(small_vit().to(device), 0.6, [1, 2])
    x = images().to(device)
    seen: list[str] = []
    remove = watch(vit.blocks[1].norm2, seen)
    with torch.no_grad():
        vit(x)
        assert len(seen) == 1
        assert 10 not in at_once
        remove()
        vit(x)
        assert len(seen) == 1 and 10 in at_once


def test_other_norms_take_the_separate_steps(
    small_vit: Any, device: torch.device, at_once: list[int]
) -> None:
    class Shifted(torch.nn.LayerNorm):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + 1

    x = images().to(device)
    with torch.no_grad():
        evit_ext.apply(small_vit(norm_layer=RmsNorm).to(device), 0.6)(x)
        evit_ext.apply(small_vit(norm_layer=Shifted).to(device), 0.6)(x)
        # Norms that PyTorch itself would refuse must go on being refused by it.
        vit = evit_ext.apply(small_vit().to(device), 0.6, [1])
        vit.blocks[1].norm2.double()
        with pytest.raises(RuntimeError, match="expected scalar type|mixed dtype|same dtype"):
            vit(x)
        vit.blocks[1].norm2 = torch.nn.LayerNorm((17, 24), device=device)
        with pytest.raises(RuntimeError, match="normalized_shape"):
            vit(x)
    assert at_once == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_takes_the_separate_steps(
    small_vit: Any, dtype: torch.dtype, device: torch.device, at_once: list[int]
) -> None:
    vit = evit_ext.apply(small_vit(dtype=dtype).to(device), 0.6)
    x = images(dtype=dtype).to(device)
    with torch.no_grad(), torch.autocast(device.type, dtype=torch.bfloat16):
        logits = vit(x)
    assert at_once == []
    with torch.no_grad():
        torch.testing.assert_close(logits.float(), vit(x).float(), rtol=0.1, atol=0.1)
    assert len(at_once) == 3


def test_drop_path_applies_without_gradients(
    small_vit: Any, device: torch.device, at_once: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    vit = evit_ext.apply(small_vit(drop_path_rate=0.5, dtype=torch.float64).to(device), 0.6, [3]).train()
    x = images(8, dtype=torch.float64).to(device)
    logits, _, expected, _ = run_both_ways(vit, x, monkeypatch)
    assert at_once == [10]
    torch.testing.assert_close(logits, expected, rtol=1e-11, atol=1e-12)


def test_compile_with_and_without_gradients(small_vit: Any, device: torch.device) -> None:
    vit = evit_ext.apply(small_vit(depth=3, dtype=torch.float64).to(device), 0.6, [0, 1])
    x = images(2, torch.float64).to(device)
    torch.compiler.reset()
    graphs: list[set[str]] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append({str(node.target) for node in graph.graph.nodes if node.op == "call_function"})
        return graph

    compiled = torch.compile(vit, fullgraph=True, backend=backend, dynamic=True)
    operator = "evit.add_reorganize_norm"
    for gradients in (True, False, True):
        with torch.set_grad_enabled(gradients):
            torch.testing.assert_close(compiled(x), vit(x))
    kernels = device.type in library.KERNEL_DEVICES
    assert [any(operator in name for name in graph) for graph in graphs] == [False, kernels]
    # Compiled again (some versions of torch do not look for hooks that come later), the model runs a hook.
    vit.blocks[0].norm2.register_forward_hook(lambda module, args, out: out + 1)
    torch.compiler.reset()
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), vit(x))


def test_export_without_gradients(small_vit: Any, device: torch.device) -> None:
    vit = evit_ext.apply(small_vit().to(device), 0.6)
    with torch.no_grad():
        program = torch.export.export(
            vit, (images(2).to(device),), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},)
        )
        for batch in (1, 5):
            x = images(batch).to(device)
            torch.testing.assert_close(program.module()(x), vit(x), rtol=1e-4, atol=1e-5)
    if device.type in library.KERNEL_DEVICES:
        names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
        assert "evit.add_reorganize_norm.default" in names


def test_recording_at_keep_rate_one_changes_nothing(
    small_vit: Any, device: torch.device, at_once: list[int]
) -> None:
    vit, x = evit_ext.apply(small_vit().to(device), 1.0), images().to(device)
    with torch.no_grad():
        expected = vit(x)
        with evit_ext.record_tokens(vit):
            assert torch.equal(vit(x), expected)
    assert at_once == []
