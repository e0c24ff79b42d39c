"""Blocks on the CPU without gradients: which forwards are faster, and that they compute the same."""

from __future__ import annotations

import copy
import io
import re
from typing import Any

import pytest
import timm.models.beit
import timm.models.eva
import torch
from cpu_calls import FAST, Build, Calls, compiling_is_exporting, images
from timm.layers import Mlp
from torch import nn

import evit_ext
from evit_ext._util.overriding import overrides
from evit_ext.cpu import forward as cpu_forward

pytestmark = pytest.mark.skipif(
    not cpu_forward.SUPPORTED, reason="the portable kernels are not used in models: they are no faster"
)


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
    ids=lambda value: re.sub(" at 0x[0-9a-f]+", "", str(value)),
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


def test_autocast(small_vit: Build, calls: Calls) -> None:
    """Attention computes in the autocast dtype; linear layers are autocast's own."""
    vit = evit_ext.apply(small_vit(), 0.7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, counted = calls.during(vit, images())
        expected = vit(images())
    assert counted == (4, 0, 0)
    # bfloat16 has 8 bits; 1.3e-2 of the largest was measured.
    torch.testing.assert_close(out, expected, rtol=0, atol=0.04 * expected.abs().max().item())


def test_compiled_without_break(small_vit: Build) -> None:
    vit = evit_ext.apply(small_vit(), 0.7)
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    with torch.no_grad():
        out = torch.compile(vit, backend=keep, fullgraph=True)(images())
        torch.testing.assert_close(out, vit(images()), rtol=1e-5, atol=1e-5)
    targets = [str(node.target) for node in graphs[0].graph.nodes]
    assert sum("attention_with_scores" in target for target in targets) == (
        0 if compiling_is_exporting() else 4
    )
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
