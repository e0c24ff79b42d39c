"""evit_ext.prepack: the same results, whatever happens to the weights."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import evit_ext
from evit_ext.cpu import forward as cpu_forward
from evit_ext.cpu import packed_weights

pytestmark = pytest.mark.skipif(
    not cpu_forward.SUPPORTED or packed_weights._reorder is None,
    reason="the layers do not run through oneDNN here",
)

Build = Callable[..., Any]


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many weights were packed, and how many products used one that was."""
    counted = [0, 0]
    reorder, weight_of = packed_weights._reorder, packed_weights.weight_of

    def count(weight: Tensor) -> Tensor:
        counted[0] += 1
        return reorder(weight)

    def count_use(layer: nn.Linear, own: Tensor) -> Tensor:
        weight = weight_of(layer, own)
        counted[1] += weight.is_mkldnn
        return weight

    monkeypatch.setattr(packed_weights, "_reorder", count)
    monkeypatch.setattr(packed_weights, "weight_of", count_use)
    return counted


def images(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)).to(dtype)


def logits(vit: nn.Module) -> Tensor:
    with torch.no_grad():
        return vit(images(next(vit.parameters()).dtype))


def expected(vit: Any) -> Tensor:
    """What the same model computes with nothing packed: its copy."""
    return logits(copy.deepcopy(vit))


def close(vit: nn.Module) -> None:
    wanted = expected(vit)
    scale = wanted.abs().max().item()
    # The same product; oneDNN may choose another kernel for it. No difference was seen.
    bound = (3e-6 if wanted.dtype == torch.float32 else 2e-2) * scale
    torch.testing.assert_close(logits(vit), wanted, rtol=0, atol=bound)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_logits(small_vit: Build, packed: list[int], dtype: torch.dtype) -> None:
    if dtype not in cpu_forward._LINEAR_DTYPES:
        pytest.skip(f"oneDNN does not multiply {dtype} here")
    vit = evit_ext.apply(small_vit(dtype=dtype), 0.7)
    assert evit_ext.prepack(vit) is vit
    close(vit)
    assert packed == [17, 17]
    close(vit)
    assert packed == [17, 34]  # not again
    evit_ext.prepack(vit, False)
    close(vit)
    assert packed == [17, 34]


def _optimize(vit: Any, fused: bool = False) -> None:
    with torch.enable_grad():
        vit(images()).square().mean().backward()
    torch.optim.SGD(vit.parameters(), lr=0.1, fused=fused).step()


def _optimize_fused(vit: Any) -> None:
    # Of which PyTorch counts no change.
    _optimize(vit, fused=True)


def _load(vit: Any) -> None:
    vit.load_state_dict({name: value * 1.1 for name, value in vit.state_dict().items()})


def _assign(vit: Any) -> None:
    vit.load_state_dict({name: value * 1.1 for name, value in vit.state_dict().items()}, assign=True)


def _replace_data(vit: Any) -> None:
    for parameter in vit.parameters():
        parameter.data = parameter.data * 1.1


def _copy(vit: Any) -> None:
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.copy_(parameter * 1.1)


def _to_and_back(vit: Any) -> None:
    # What was at the old addresses is free by then, and might be had again.
    vit.to(torch.bfloat16).to(torch.float32)


@pytest.mark.parametrize(
    "change", [_optimize, _optimize_fused, _load, _assign, _replace_data, _copy, _to_and_back]
)
def test_changes_are_noticed(small_vit: Build, packed: list[int], change: Callable[[Any], None]) -> None:
    vit = evit_ext.prepack(evit_ext.apply(small_vit(), 0.7))
    before = logits(vit)
    change(vit)
    close(vit)
    assert packed == [34, 34]
    assert not torch.allclose(logits(vit), before, rtol=1e-4)


def test_an_optimizer_of_other_weights_changes_nothing(small_vit: Build, packed: list[int]) -> None:
    vit, other = evit_ext.prepack(evit_ext.apply(small_vit(), 0.7)), small_vit()
    logits(vit)
    _optimize(other, fused=True)
    logits(vit)
    assert packed == [17, 34]


def test_optimizers_can_still_be_compiled(small_vit: Build, packed: list[int]) -> None:
    vit = evit_ext.prepack(evit_ext.apply(small_vit(), 0.7))
    logits(vit)
    with torch.enable_grad():
        vit(images()).square().mean().backward()
    optimizer = torch.optim.SGD(vit.blocks[0].attn.qkv.parameters(), lr=0.1)
    torch.compile(optimizer.step, backend="aot_eager")()
    close(vit)
    assert packed == [18, 34]


def test_weights_made_in_inference_mode_are_not_packed(small_vit: Build, packed: list[int]) -> None:
    """Their changes are not counted, and whoever asks for it is told."""
    with torch.inference_mode():
        vit = evit_ext.apply(small_vit(), 0.7)
    evit_ext.prepack(vit)
    with torch.inference_mode():
        with pytest.warns(UserWarning, match="no effect on weights that were made in torch.inference_mode"):
            before = logits(vit)
        for parameter in vit.parameters():
            parameter.mul_(1.1)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # once is enough
            assert not torch.allclose(logits(vit), before, rtol=1e-4)
    assert packed == [0, 0]


def test_where_it_has_no_effect(small_vit: Build, packed: list[int]) -> None:
    vit = evit_ext.prepack(evit_ext.apply(small_vit(), 0.7))
    vit(images())  # with gradients
    evit_ext.set_keep_rate(vit, 1.0)
    close(vit)
    assert packed == [0, 0]
    evit_ext.set_keep_rate(vit, 0.7)
    close(vit)
    assert packed == [17, 17]
    close(evit_ext.remove(vit))
    assert packed == [17, 17]


def test_nothing_else_of_the_model_changes(small_vit: Build, packed: list[int]) -> None:
    vit = evit_ext.apply(small_vit(), 0.7)
    keys = list(vit.state_dict())
    evit_ext.prepack(vit)
    wanted = logits(vit)
    assert list(vit.state_dict()) == keys
    file = io.BytesIO()
    torch.save(vit, file)
    file.seek(0)
    for other in (copy.deepcopy(vit), pickle.loads(pickle.dumps(vit)), torch.load(file, weights_only=False)):
        torch.testing.assert_close(logits(other), wanted)
    assert packed == [17, 17]


def test_it_goes_with_the_model(small_vit: Build) -> None:
    gc.collect()
    before = len(packed_weights._PACKED)
    vit = evit_ext.prepack(evit_ext.apply(small_vit(), 0.7))
    logits(vit)
    assert len(packed_weights._PACKED) == before + 17
    gone = weakref.ref(vit.blocks[0].attn.qkv)
    del vit
    gc.collect()
    assert gone() is None and len(packed_weights._PACKED) == before


def test_a_compiled_model_hands_it_on(small_vit: Build, packed: list[int]) -> None:
    vit = evit_ext.apply(small_vit(), 0.7)
    evit_ext.prepack(torch.compile(vit))
    close(vit)
    assert packed == [17, 17]


def test_of_transformers(packed: list[int]) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64}
    config = transformers.ViTConfig(**sizes, image_size=32, patch_size=8)
    vit = transformers.ViTForImageClassification(config).eval()
    evit_ext.prepack(evit_ext.apply(vit, 0.7))
    with torch.no_grad():
        found, wanted = vit(images()).logits, copy.deepcopy(vit)(images()).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert packed[0] == packed[1] > 0


def test_a_model_that_is_no_evit(small_vit: Build) -> None:
    with pytest.raises(ValueError, match=r"apply"):
        evit_ext.prepack(small_vit())
