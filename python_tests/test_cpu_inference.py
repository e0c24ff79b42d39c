"""Blocks on the CPU without gradients: the faster forwards, and where they must stand back."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import timm.models.beit
import timm.models.eva
import torch
from timm.layers import Mlp
from timm.models.vision_transformer import Attention
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

import evit_ext
from evit_ext import cpu_inference, ops
from evit_ext.override import overrides

pytestmark = pytest.mark.skipif(
    not cpu_inference.SUPPORTED, reason="the portable kernels are not used in models: they are no faster"
)

Build = Callable[..., Any]


class Calls:
    """Counts the calls of the attention kernel and of oneDNN's linear layers."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.attention = self.linear = self.gelu = 0
        attention, linear = ops.attention_with_scores, cpu_inference._linear_pointwise

        def count_attention(*arguments: Any) -> Any:
            self.attention += 1
            return attention(*arguments)

        def count_linear(x: Tensor, weight: Tensor, bias: Tensor, what: str, *rest: Any) -> Tensor:
            self.linear += 1
            self.gelu += what == "gelu"
            return linear(x, weight, bias, what, *rest)

        monkeypatch.setattr(ops, "attention_with_scores", count_attention)
        monkeypatch.setattr(cpu_inference, "_linear_pointwise", count_linear)

    def during(self, model: nn.Module, images: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
        """Return what `model` computes without gradients, and the calls that took."""
        self.attention = self.linear = self.gelu = 0
        with torch.no_grad():
            out = model(images)
        return out, (self.attention, self.linear, self.gelu)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return Calls(monkeypatch)


def images(dtype: torch.dtype = torch.float32, batch: int = 3) -> Tensor:
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(0)).to(dtype)


#: A block has an attention, four linear layers, one of them with a GELU; the model has four blocks.
FAST = (4, 16, 4)


def test_every_block_is_faster_without_gradients(small_vit: Build, calls: Calls) -> None:
    vit = evit_ext.apply(small_vit(), 0.7)
    out, counted = calls.during(vit, images())
    assert counted == FAST
    assert calls.during(vit, images(batch=0))[1] == (4, 0, 0)  # oneDNN takes no empty batch
    calls.attention = calls.linear = 0
    with_gradients = vit(images())
    assert calls.attention == 4 and calls.linear == 0  # see test_cpu_training.py
    # Float32 rounding: at most 3e-7 of the largest logit was seen.
    scale = with_gradients.abs().max().item()
    torch.testing.assert_close(out, with_gradients, rtol=0, atol=3e-6 * scale)
    assert not torch.equal(out, with_gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_no_less_exact_than_pytorch(small_vit: Build, dtype: torch.dtype) -> None:
    """In each dtype, as near to float64 as timm's own forward, up to chance."""
    vit = evit_ext.apply(small_vit(embed_dim=192, num_heads=3), 0.7).to(dtype)
    # Kept tokens must not differ from float64's, where a step of rounding would change the logits by much.
    exact = copy.deepcopy(vit).double()
    ours, theirs = [], []
    for seed in range(6):
        x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(seed)).to(dtype)
        block: Any = exact.blocks[0]
        tokens = exact._pos_embed(exact.patch_embed(x.double())).detach()
        expected = block(tokens)
        with torch.no_grad():
            ours.append((vit.blocks[0](tokens.to(dtype)).double() - expected).square().mean().item())
        theirs.append((vit.blocks[0](tokens.to(dtype)).double() - expected).square().mean().item())
    ratio = (sum(ours) / sum(theirs)) ** 0.5
    assert 0.8 < ratio < 1.2  # measured: 1.05, 0.98, 0.99


def test_with_keep_rate_1_the_model_is_what_it_was(small_vit: Build, calls: Calls) -> None:
    dense = small_vit()
    with torch.no_grad():
        expected = dense(images())
    vit = evit_ext.apply(copy.deepcopy(dense), 1.0)
    for rate, counted in ((1.0, (0, 0, 0)), (0.7, FAST), ((1, 1, 0.9), FAST), (1, (0, 0, 0))):
        evit_ext.set_keep_rate(vit, rate)
        out, found = calls.during(vit, images())
        assert found == counted, rate
        assert torch.equal(out, expected) == (counted == (0, 0, 0))


def test_recording_changes_no_bit(small_vit: Build, calls: Calls) -> None:
    """Also in a stage that keeps all patches, whose block then does not run the replaced block's forward."""
    vit = evit_ext.apply(small_vit(), (1.0, 0.7, 0.5))
    expected, _ = calls.during(vit, images())
    with evit_ext.record_tokens(vit):
        out, counted = calls.during(vit, images())
    assert torch.equal(out, expected) and counted == FAST


def test_remove_leaves_nothing(small_vit: Build, calls: Calls) -> None:
    vit = small_vit()
    before = [set(module.__dict__) for module in vit.modules()]
    evit_ext.apply(vit, 0.7)
    assert vit.state_dict().keys() == small_vit().state_dict().keys()
    evit_ext.remove(vit)
    assert [set(module.__dict__) for module in vit.modules()] == before
    assert calls.during(vit, images())[1] == (0, 0, 0)


def test_copies_have_their_own(small_vit: Build, calls: Calls) -> None:
    vit = evit_ext.apply(small_vit(), 0.7)
    expected, _ = calls.during(vit, images())
    saved = io.BytesIO()
    torch.save(vit, saved)
    saved.seek(0)
    replica = copy.deepcopy(vit)
    replica.blocks[0].attn = vit.blocks[0].attn._replicate_for_data_parallel()
    for other in (copy.deepcopy(vit), torch.load(saved, weights_only=False), replica):
        for block in other.blocks:
            assert all(override.module is block.attn for override in overrides(block.attn))
        out, counted = calls.during(other, images())
        assert torch.equal(out, expected) and counted == FAST
    for parameter in copy.deepcopy(vit).parameters():
        parameter.data.zero_()
    assert torch.equal(calls.during(vit, images())[0], expected)


# Each changes a model so that some module of its second block has to run as written.

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


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"qk_norm": True}, FAST),
        ({"scale_attn_norm": True}, FAST),
        ({"scale_mlp_norm": True}, (4, 8, 0)),
        ({"act_layer": nn.ReLU}, (4, 8, 0)),
        ({"act_layer": lambda: nn.GELU(approximate="tanh")}, FAST),
        ({"mlp_layer": type("OtherMlp", (Mlp,), {})}, (4, 8, 0)),
        ({"qkv_bias": False, "init_values": 0.5}, FAST),
        ({"class_token": False, "global_pool": "avg"}, FAST),
        ({"reg_tokens": 2}, FAST),
        ({"dtype": torch.float64}, (0, 0, 0)),
    ],
    ids=str,
)
def test_kinds_of_blocks(
    small_vit: Build, calls: Calls, arguments: dict[str, Any], expected: tuple[int, int, int]
) -> None:
    vit = evit_ext.apply(small_vit(**arguments), 0.7)
    dtype = arguments.get("dtype", torch.float32)
    out, counted = calls.during(vit, images(dtype))
    assert counted == expected
    tolerance = 1e-13 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(out, vit(images(dtype)), rtol=tolerance, atol=tolerance)


def test_a_processor_without_bfloat16_products(
    small_vit: Build, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    vit = evit_ext.apply(small_vit(), 0.7).bfloat16()
    monkeypatch.setattr(cpu_inference, "_LINEAR_DTYPES", frozenset({torch.float32}))
    assert calls.during(vit, images(torch.bfloat16))[1] == (4, 0, 0)
    monkeypatch.setattr(cpu_inference, "SUPPORTED", False)
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
    original = kind.forward

    def forward(self: Any, *arguments: Any, **named: Any) -> Any:
        SEEN.append(kind.__name__)
        return original(self, *arguments, **named)

    monkeypatch.setattr(kind, "forward", forward)
    SEEN.clear()
    calls.during(vit, images())
    # Of an attention, in the blocks that do not reorganise; and the head is a linear layer.
    assert len(SEEN) == {"Attention": 3, "Mlp": 4, "Linear": 17}[kind.__name__]


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


def test_autocast(small_vit: Build, calls: Calls) -> None:
    """Attention computes in the autocast dtype; linear layers are autocast's own."""
    vit = evit_ext.apply(small_vit(), 0.7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, counted = calls.during(vit, images())
        expected = vit(images())
    assert counted == (4, 0, 0)
    # bfloat16 has 8 bits; 1.3e-2 of the largest was measured.
    torch.testing.assert_close(out, expected, rtol=0, atol=0.04 * expected.abs().max().item())


def test_onednn_that_is_switched_off(small_vit: Build, calls: Calls) -> None:
    vit = evit_ext.apply(small_vit(), 0.7)
    with torch.backends.mkldnn.flags(enabled=False):
        assert calls.during(vit, images())[1] == (4, 0, 0)


def test_compiled_without_break(small_vit: Build) -> None:
    vit = evit_ext.apply(small_vit(), 0.7)
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    def calls_it_exporting(x: Tensor) -> Tensor:
        return x + 1 if torch.compiler.is_exporting() else x

    old = bool(torch.compile(calls_it_exporting, backend="eager")(torch.zeros(1)))  # torch 2.10
    with torch.no_grad():
        out = torch.compile(vit, backend=keep, fullgraph=True)(images())
        torch.testing.assert_close(out, vit(images()), rtol=1e-5, atol=1e-5)
    targets = [str(node.target) for node in graphs[0].graph.nodes]
    assert sum("attention_with_scores" in target for target in targets) == (0 if old else 4)
    assert not any("mkldnn" in target for target in targets)  # inductor fuses linear layers by itself
    assert len(graphs) == 1


@pytest.mark.parametrize("strict", [False, True], ids=["not strict", "strict"])
def test_exported_in_operators_that_every_device_has(small_vit: Build, strict: bool) -> None:
    vit = evit_ext.apply(small_vit(), 0.7)
    with torch.no_grad():
        program = torch.export.export(vit, (images(),), strict=strict)
    targets = {str(node.target) for node in program.graph.nodes}
    assert not any("attention_with_scores" in target or "mkldnn" in target for target in targets)
    assert "aten.scaled_dot_product_attention.default" in targets


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:`torch.jit")
def test_traced_as_timm_wrote_it(small_vit: Build) -> None:
    vit = evit_ext.apply(small_vit(), 0.7)
    with torch.no_grad():
        traced = torch.jit.trace(vit, images())
        graph = str(traced.inlined_graph)
        assert "scaled_dot_product" in graph
        assert "attention_with_scores" not in graph and "mkldnn" not in graph
        torch.testing.assert_close(traced(images()), vit(images()), rtol=1e-5, atol=1e-5)


def test_other_families(calls: Calls) -> None:
    small = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 2, "num_classes": 5}
    eva = timm.models.eva.Eva(**small, qkv_fused=True).eval()
    rotary = timm.models.eva.Eva(**small, use_rot_pos_emb=True).eval()
    beit = timm.models.beit.Beit(**small).eval()
    biased = timm.models.beit.Beit(**small, use_rel_pos_bias=True).eval()
    separate = timm.models.eva.Eva(**small, qkv_fused=False, use_rot_pos_emb=True).eval()
    # With biases between places, attention is timm's.
    for vit, expected in (
        (eva, FAST),
        (rotary, FAST),
        (separate, (4, 24, 4)),
        (beit, FAST),
        (biased, (0, 8, 4)),
    ):
        evit_ext.apply(vit, 0.7)
        for parameter in vit.parameters():
            nn.init.normal_(parameter, std=0.2)
        out, counted = calls.during(vit, images())
        torch.testing.assert_close(out, vit(images()), rtol=1e-5, atol=1e-5)
        assert counted == expected
