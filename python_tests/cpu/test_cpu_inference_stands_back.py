"""Blocks on the CPU without gradients: where the faster forwards must stand back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cpu_calls import FAST, Build, Calls, images, watch_class
from timm.layers import Mlp
from timm.models.vision_transformer import Attention
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

import evit_ext
from evit_ext.cpu import forward as cpu_forward

pytestmark = pytest.mark.skipif(
    not cpu_forward.SUPPORTED, reason="the portable kernels are not used in models: they are no faster"
)


#: What ran as written, noted by the changes below; each makes some module of the second block do so.
SEEN: list[str] = []


def _hook(vit: Any, name: str) -> None:
    module = vit.get_submodule(f"blocks.1.{name}")
    module.register_forward_hook(lambda *_: SEEN.append(name))


def _own_forward(vit: Any, name: str) -> None:
    module = vit.get_submodule(f"blocks.1.{name}")
    original = module.forward

    def forward(*arguments: Any, **named: Any) -> Any:
        SEEN.append(name)
        return original(*arguments, **named)

    module.forward = forward


class _Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        SEEN.append("linear")
        return super().forward(x)


def _subclass(vit: Any, name: str) -> None:
    module = vit.get_submodule(f"blocks.1.{name}")
    module.__class__ = _Linear


def _dropout(vit: Any, name: str) -> None:
    module = vit.get_submodule(f"blocks.1.{name}")
    module.p = 0.5
    module.train()
    if name == "attn.attn_drop":
        vit.blocks[1].attn.training = True


@pytest.mark.parametrize(
    ("change", "name", "expected"),
    [
        # What an attention or an MLP loses, of (4, 16, 4).
        (_hook, "attn", FAST),
        (_hook, "mlp", FAST),
        (_hook, "attn.qkv", (4, 15, 4)),
        (_hook, "attn.proj", (4, 15, 4)),
        (_hook, "attn.q_norm", FAST),
        (_hook, "mlp.fc1", (4, 14, 3)),
        (_hook, "mlp.act", (4, 14, 3)),
        (_hook, "mlp.drop1", (4, 14, 3)),
        (_hook, "mlp.norm", (4, 14, 3)),
        (_hook, "mlp.fc2", (4, 15, 4)),
        (_own_forward, "attn.qkv", (4, 15, 4)),
        (_own_forward, "mlp.fc1", (4, 14, 3)),
        (_own_forward, "mlp.act", (4, 14, 3)),
        (_subclass, "attn.proj", (4, 15, 4)),
        (_subclass, "mlp.fc1", (4, 14, 3)),
        (_subclass, "mlp.fc2", (4, 15, 4)),
    ],
    ids=lambda value: value.__name__ if callable(value) else str(value),
)
def test_what_somebody_watches_or_changes_runs(
    small_vit: Build,
    calls: Calls,
    change: Callable[[Any, str], None],
    name: str,
    expected: tuple[int, int, int],
) -> None:
    vit = evit_ext.apply(small_vit(), 0.7, drop_loc=(2,))
    before, _ = calls.during(vit, images())
    change(vit, name)
    SEEN.clear()
    out, counted = calls.during(vit, images())
    assert counted == expected
    assert len(SEEN) == 1
    torch.testing.assert_close(out, before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("attn.attn_drop", (3, 14, 4)), ("mlp.drop1", (4, 14, 3)), ("mlp.drop2", (4, 14, 3))],
)
def test_dropout_drops(small_vit: Build, calls: Calls, name: str, expected: tuple[int, int, int]) -> None:
    vit = evit_ext.apply(small_vit(), 0.7, drop_loc=(2,))
    before, _ = calls.during(vit, images())
    _dropout(vit, name)
    out, counted = calls.during(vit, images())
    assert counted == expected
    assert (out - before).abs().max() > 1e-2


def test_a_processor_without_bfloat16_products(
    small_vit: Build, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    vit = evit_ext.apply(small_vit(), 0.7).bfloat16()
    monkeypatch.setattr(cpu_forward, "_LINEAR_DTYPES", frozenset({torch.float32}))
    assert calls.during(vit, images(torch.bfloat16))[1] == (4, 0, 0)
    monkeypatch.setattr(cpu_forward, "SUPPORTED", False)
    assert calls.during(vit, images(torch.bfloat16))[1] == (0, 0, 0)


def test_materialised_attention_stays(small_vit: Build, calls: Calls) -> None:
    """Who turns timm's fused attention off wants to see the map."""
    vit = evit_ext.apply(small_vit(), 0.7, drop_loc=(2,))
    vit.blocks[0].attn.fused_attn = False
    vit.blocks[0].attn.attn_drop.register_forward_hook(lambda *_: SEEN.append("map"))
    SEEN.clear()
    assert calls.during(vit, images())[1][0] == 3
    assert SEEN == ["map"]


def test_parameters_of_other_layouts(small_vit: Build, calls: Calls) -> None:
    """oneDNN is told the address of a bias, not its strides."""
    vit = evit_ext.apply(small_vit(), 0.7)
    expected, _ = calls.during(vit, images())
    for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"):
        layer = vit.get_submodule(f"blocks.1.{name}")
        layer.bias = nn.Parameter(torch.stack((layer.bias.detach(), layer.bias.detach() + 9), dim=1)[:, 0])
        layer.weight = nn.Parameter(layer.weight.detach().T.contiguous().T)
    out, counted = calls.during(vit, images())
    assert counted == (4, 12, 3)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    vit.blocks[2].mlp.fc2.weight = nn.Parameter(vit.blocks[2].mlp.fc2.weight.detach().to_sparse_csr())
    out, counted = calls.during(vit, images())
    assert counted == (4, 11, 3)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def test_wrappers_of_others_stay(small_vit: Build, calls: Calls) -> None:
    """As some libraries put them, with what they wrap under another name."""
    vit = evit_ext.apply(small_vit(), 0.7, drop_loc=(2,))
    _own_forward(vit, "mlp")
    vit.blocks[1].mlp.original_forward = vit.blocks[2].mlp.forward
    wrapper = vit.blocks[1].mlp.forward
    evit_ext.set_keep_rate(vit, 1.0)
    evit_ext.set_keep_rate(vit, 0.7)
    assert vit.blocks[1].mlp.forward is wrapper
    evit_ext.remove(vit)
    assert vit.blocks[1].mlp.forward is wrapper
    SEEN.clear()
    assert calls.during(vit, images())[1] == (0, 0, 0)  # what it wraps computes as timm does
    assert SEEN == ["mlp"]


@pytest.mark.parametrize("kind", [Attention, Mlp, nn.Linear], ids=lambda kind: kind.__name__)
def test_another_forward_of_a_class(
    small_vit: Build, calls: Calls, monkeypatch: pytest.MonkeyPatch, kind: Any
) -> None:
    vit = evit_ext.apply(small_vit(), 0.7, drop_loc=(2,))
    watch_class(monkeypatch, kind, SEEN)
    calls.during(vit, images())
    # In reorganising blocks too; and the head is a linear layer.
    assert len(SEEN) == {"Attention": 4, "Mlp": 4, "Linear": 17}[kind.__name__]


def test_forward_mode_derivatives_go_on_without_gradients(small_vit: Build, calls: Calls) -> None:
    vit = evit_ext.apply(small_vit(), 0.7)
    x = images()
    with torch.no_grad(), forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
        tangent = forward_ad.unpack_dual(vit(forward_ad.make_dual(x, torch.ones_like(x)))).tangent
    assert calls.attention == 0
    assert tangent is not None and tangent.abs().max() > 0


def test_masks_go_to_timm(small_vit: Build, calls: Calls) -> None:
    vit = evit_ext.apply(small_vit(), 0.7)
    x = torch.randn(2, 17, 24)
    mask = torch.zeros(17, 17).index_fill(1, torch.tensor([3]), float("-inf"))
    with torch.no_grad():
        for arguments in ({"attn_mask": mask}, {"is_causal": True}):
            masked = vit.blocks[0].attn(x, **arguments)
            assert calls.attention == 0
            assert (masked - vit.blocks[0].attn(x)).abs().max() > 1e-3
            calls.attention = 0


def test_global_hooks_see_all_layers(small_vit: Build, calls: Calls) -> None:
    vit = evit_ext.apply(small_vit(), 0.7)
    seen: list[str] = []
    handle = torch.nn.modules.module.register_module_forward_hook(
        lambda module, *_: seen.append(type(module).__name__)
    )
    try:
        assert calls.during(vit, images())[1] == (4, 0, 0)
    finally:
        handle.remove()
    assert seen.count("Linear") == 4 * 4 + 1 and seen.count("GELU") == 4


def test_onednn_that_is_switched_off(small_vit: Build, calls: Calls) -> None:
    vit = evit_ext.apply(small_vit(), 0.7)
    with torch.backends.mkldnn.flags(enabled=False):
        assert calls.during(vit, images())[1] == (4, 0, 0)
