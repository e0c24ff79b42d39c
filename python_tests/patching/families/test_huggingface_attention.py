"""transformers' attention maps and attention functions in models that reorganise tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from huggingface_models import transformers
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.vit.modeling_vit import ViTAttention

import evit_ext

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENS = [65, 65, 65, 41, 41, 26, 26, 17]


def vit(implementation: str) -> Any:
    torch.manual_seed(0)
    sizes = {"image_size": 64, "patch_size": 8, "hidden_size": 48, "intermediate_size": 96}
    config = transformers.ViTConfig(
        **sizes, num_hidden_layers=8, num_attention_heads=3, attn_implementation=implementation
    )
    return transformers.ViTModel(config).eval()


def images() -> Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def test_every_layer_has_its_map() -> None:
    model = evit_ext.apply(vit("eager"), 0.6)
    with evit_ext.record_tokens(model) as record:
        out = model(images(), output_attentions=True, output_hidden_states=True)
    assert [tuple(of_layer.shape) for of_layer in out.attentions] == [(2, 3, n, n) for n in TOKENS]
    assert len(out.hidden_states) == 9
    for stage, layer in enumerate((2, 4, 6)):  # and the map is the one that the scores are of
        torch.testing.assert_close(out.attentions[layer][:, :, 0, 1:].mean(dim=1), record.scores[stage])


def test_asking_for_states_once_leaves_nothing_slower(calls: Any) -> None:
    model = evit_ext.apply(vit("sdpa"), 0.6)
    with torch.no_grad():
        before = model(images()).last_hidden_state
        model(images(), output_hidden_states=True)  # which leaves hooks of transformers' own
    out, (attentions, _, _) = calls.during(lambda x: model(x).last_hidden_state, images())
    assert torch.equal(out, before) and attentions == 8


@pytest.mark.parametrize("name", ["mine", "sdpa"])
def test_an_attention_function_of_ones_own(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Registered under a new name, or in the place of a known one."""
    asked: list[Any] = []

    def zeros(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **named: Any) -> tuple[Tensor, None]:
        asked.append(named["scaling"])
        return torch.zeros_like(q).transpose(1, 2).contiguous(), None

    known = dict(ALL_ATTENTION_FUNCTIONS._local_mapping)
    monkeypatch.setattr(ALL_ATTENTION_FUNCTIONS, "_local_mapping", {**known, name: zeros})
    dense, model = vit(name), evit_ext.apply(vit(name), 0.6)
    model(images())
    assert len(asked) == 8
    evit_ext.set_keep_rate(model, 1.0)
    assert torch.equal(model(images()).last_hidden_state, dense(images()).last_hidden_state)


def test_a_class_forward_that_changes_later(monkeypatch: pytest.MonkeyPatch) -> None:
    model, original = evit_ext.apply(vit("sdpa"), 0.6), ViTAttention.forward
    before = model(images()).last_hidden_state
    monkeypatch.setattr(ViTAttention, "forward", lambda self, *a, **k: (original(self, *a, **k)[0] * 0, None))
    silent = model(images()).last_hidden_state
    assert not torch.allclose(silent, before)
    with torch.no_grad():
        for layer in model.layers:
            layer.attention.o_proj.weight.zero_()
            layer.attention.o_proj.bias.zero_()
    monkeypatch.undo()
    torch.testing.assert_close(model(images()).last_hidden_state, silent)


def test_scaling_is_heeded() -> None:
    model, eager = evit_ext.apply(vit("sdpa"), 0.6), evit_ext.apply(vit("eager"), 0.6)
    for layer in (*model.layers, *eager.layers):
        layer.attention.scaling *= 3
    torch.testing.assert_close(model(images()).last_hidden_state, eager(images()).last_hidden_state)


def test_causal_attention_is_heeded() -> None:
    dense, model = vit("sdpa"), evit_ext.apply(vit("sdpa"), 0.6)
    whole = evit_ext.apply(vit("sdpa"), 1.0)
    for each in (dense, model, whole):
        for layer in each.layers:
            layer.attention.is_causal = True
    torch.testing.assert_close(whole(images()).last_hidden_state, dense(images()).last_hidden_state)
    eager = evit_ext.apply(vit("sdpa"), 0.6)(images()).last_hidden_state
    assert (model(images()).last_hidden_state - eager).abs().max() > 1e-3


def test_hints_for_models_of_transformers() -> None:
    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 3}
    vision = transformers.CLIPVisionConfig(**sizes, image_size=32, patch_size=8)
    text = transformers.LlamaConfig(**sizes, vocab_size=32)
    llava = transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(vision_config=vision, text_config=text)
    )
    with pytest.raises(ValueError, match="its vision model is .model.vision_tower, whose language model"):
        evit_ext.apply(llava)
    for name, known in (("DINOv3ViTModel", "timm's DINOv3"), ("BeitModel", "timm's BEiT")):
        config = getattr(transformers, name).config_class(**sizes, image_size=32, patch_size=8)
        with pytest.raises(ValueError, match=f"{known} .* is supported"):
            evit_ext.apply(getattr(transformers, name)(config))
