"""Which precision is chosen, and what autocast does with it."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from evit_ext.training import Precision, attention_for_training, autocast, choose_precision
from evit_ext.training import precision as module

FLOAT32 = Precision(torch.float32, "test")
BFLOAT16 = Precision(torch.bfloat16, "test")


@pytest.mark.parametrize(
    ("features", "dtype", "reason"),
    [
        ({"AMX": True, "AVX512_BF16": True}, torch.bfloat16, "AMX"),
        ({"AMX": False, "AVX512_BF16": True}, torch.bfloat16, "AVX512_BF16"),
        ({"AMX": False, "AVX512_BF16": False}, torch.float32, "no bfloat16"),
    ],
)
def test_the_processor_decides(
    monkeypatch: pytest.MonkeyPatch, features: dict[str, bool], dtype: torch.dtype, reason: str
) -> None:
    monkeypatch.setattr(module, "_cpu_bfloat16_features", lambda: features)
    chosen = choose_precision("cpu")
    assert chosen.dtype == dtype
    assert reason in str(chosen)
    assert str(chosen).startswith(("float32 (", "bfloat16 ("))


@pytest.mark.parametrize("amx", [False, True])
@pytest.mark.parametrize("avx512", [False, True])
def test_features_are_asked_for_in_old_and_new_ways(
    monkeypatch: pytest.MonkeyPatch, amx: bool, avx512: bool
) -> None:
    new = SimpleNamespace(get_capabilities=lambda: {"amx_bf16": amx, "avx512_bf16": avx512, "avx2": True})
    old = SimpleNamespace(_is_amx_tile_supported=lambda: amx, _is_avx512_bf16_supported=lambda: avx512)
    for cpu in (new, old):
        monkeypatch.setattr(torch, "cpu", cpu)
        assert module._cpu_bfloat16_features() == {"AMX": amx, "AVX512_BF16": avx512}
    monkeypatch.setattr(torch, "cpu", SimpleNamespace())
    assert not any(module._cpu_bfloat16_features().values())


def test_this_processor_is_asked() -> None:
    assert choose_precision("cpu").dtype in (torch.float32, torch.bfloat16)


def test_the_user_decides() -> None:
    assert choose_precision("cpu", "float32").dtype == torch.float32
    assert choose_precision("cpu", "bfloat16").dtype == torch.bfloat16
    assert choose_precision("meta").dtype == torch.float32
    assert choose_precision("cpu", "float16").dtype == torch.float16
    with pytest.raises(ValueError, match="one of 'auto', 'float32', 'bfloat16', 'float16', got 'float8'"):
        choose_precision("cpu", "float8")


def test_autocast() -> None:
    q = torch.randn(2, 3, 5, 8)
    layer = torch.nn.Linear(8, 8)
    expected = F.scaled_dot_product_attention(layer(q), q, q)
    with autocast("cpu", FLOAT32):
        assert torch.equal(F.scaled_dot_product_attention(layer(q), q, q), expected)
    with autocast("cpu", BFLOAT16):
        out = F.scaled_dot_product_attention(layer(q), q, q)
    assert out.dtype == torch.bfloat16
    # Eight bits of mantissa, values up to about 2.
    torch.testing.assert_close(out.float(), expected, atol=0.03, rtol=0.03)
    assert not torch.is_autocast_enabled("cpu")


def test_training_in_bfloat16_composes_attention() -> None:
    """The fused CPU kernel's backward is slow in bfloat16, so its node must not be in the graph."""
    q = torch.randn(2, 3, 5, 8, requires_grad=True)
    names = {}
    for training in (False, True):
        attention = attention_for_training("cpu", BFLOAT16) if training else nullcontext()
        with attention, autocast("cpu", BFLOAT16):
            names[training] = _graph(F.scaled_dot_product_attention(q, q, q))
    assert any("FlashAttention" in name for name in names[False])
    assert not any("FlashAttention" in name for name in names[True])


def _graph(output: torch.Tensor) -> set[str]:
    seen, todo = set(), [output.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [following for following, _ in node.next_functions]
    return {node.name() for node in seen}
