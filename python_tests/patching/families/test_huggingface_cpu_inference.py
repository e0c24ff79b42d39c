"""Layers of transformers on the CPU without gradients: the faster forwards, and where they stand back."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from cpu_calls import Calls
from huggingface_models import LINES, build, images, output
from torch import nn

import evit_ext
from evit_ext.cpu import forward as cpu_forward

pytestmark = pytest.mark.skipif(
    not cpu_forward.SUPPORTED, reason="the portable kernels are not used in models: they are no faster"
)


@pytest.mark.parametrize("line", LINES)
def test_every_layer_is_faster_without_gradients(line: str, calls: Calls) -> None:
    model = evit_ext.apply(build(line), 0.7)
    with torch.no_grad():
        out = output(model, images())
    # Four layers, each with four projections and an MLP of two linear layers: of a SwiGLU, none; CLIP's
    # activation, QuickGELU, is no GELU, and so its MLP runs as written.
    gelu = "CLIP" not in line and "SwiGLU" not in line
    assert (calls.attention, calls.linear, calls.gelu) == (4, 16 + 8 * gelu, 4 * gelu)
    calls.attention = calls.linear = 0
    expected = output(model, images())
    assert (calls.attention, calls.linear) == (4, 0)  # with gradients, attention alone
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_with_keep_rate_1_and_after_remove(calls: Calls) -> None:
    dense = build("ViT")
    with torch.no_grad():
        expected = output(dense, images())
        model = evit_ext.apply(copy.deepcopy(dense), 1.0)
        assert torch.equal(output(model, images()), expected)
        output(evit_ext.set_keep_rate(model, 0.7), images())
        assert calls.attention == 4
        assert torch.equal(output(evit_ext.set_keep_rate(model, 1), images()), expected)
        assert torch.equal(output(evit_ext.remove(evit_ext.set_keep_rate(model, 0.7)), images()), expected)
    assert calls.attention == 4
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_eager_attention_gives_its_maps(calls: Calls) -> None:
    """In every layer: transformers' own code runs there."""
    model = evit_ext.apply(build("ViT", attn_implementation="eager"), 0.7, drop_loc=(2,))
    with torch.no_grad():
        maps = model(pixel_values=images(), output_attentions=True).attentions
    assert calls.attention == 0
    assert [tuple(each.shape) for each in maps] == [(3, 2, 17, 17)] * 3 + [(3, 2, 14, 14)]


def test_tensors_and_scales_are_heeded(calls: Calls) -> None:
    model: Any = evit_ext.apply(build("ViT"), 0.7, drop_loc=(2,))
    with torch.no_grad():
        expected = output(model, images())
        calls.attention = 0
        # Which transformers hands on, and nobody reads.
        out = output(model, images(), token_type_ids=torch.zeros(3, 17))
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
        assert calls.attention == 1
        model.vit.layers[0].attention.scaling = 3.0
        assert (output(model, images()) - expected).abs().max() > 1e-3


def test_hidden_states_are_recorded(calls: Calls) -> None:
    model = evit_ext.apply(build("ViT"), 0.7, drop_loc=(2,))
    with torch.no_grad():
        states = model(pixel_values=images(), output_hidden_states=True).hidden_states
        assert calls.attention == 4
    assert len(states) == 5


def test_dropout_drops(calls: Calls) -> None:
    model: Any = evit_ext.apply(build("ViT", attention_probs_dropout_prob=0.4), 0.7)
    with torch.no_grad():
        before = output(model, images())
        for module in model.modules():
            module.training = isinstance(module, nn.Module) and type(module).__name__ == "ViTAttention"
        calls.attention = 0
        assert (output(model, images()) - before).abs().max() > 1e-2
    assert calls.attention == 0
