"""Which language models have towers that may hand on fewer tokens, and what the others are told."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_language_models import LINES, TEXT, TOWER, inputs, photo, transformers
from torch import nn

import evit_ext
from evit_ext import towers
from evit_ext.towers.language_models import KINDS, REASONS

#: What does not fit is refused before anything is built of it: the sizes of these models do not matter.
REFUSED = {
    "AyaVision": "pixel shuffle joins neighbouring patches",
    "Cohere2Vision": "pixel shuffle joins neighbouring patches",
    "Gemma3": "pooling averages neighbouring patches",
    "Idefics2": "a fixed number of queries",
    "Idefics3": "pixel shuffle joins neighbouring patches",
    "InternVL": "pixel shuffle joins neighbouring patches",
    "Llama4": "pixel shuffle joins neighbouring patches",
    "Mistral3": "merger joins neighbouring patches",
    "Qwen2VL": "merger joins neighbouring patches",
    "Qwen2_5_VL": "merger joins neighbouring patches",
    "Qwen3VL": "merger joins neighbouring patches",
    "SmolVLM": "pixel shuffle joins neighbouring patches",
    "VipLlava": "joins the features of several layers",
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_the_reason(name: str) -> None:
    with torch.device("meta"):
        config = getattr(transformers, f"{name}Config")()
        config.get_text_config().num_hidden_layers = 1
        config.vision_config.num_hidden_layers = 1
        config.vision_config.num_attention_heads = 16  # which AyaVision's defaults do not divide by
        model = getattr(transformers, f"{name}ForConditionalGeneration")(config)
    before = str(model)
    with pytest.raises(
        ValueError, match=f"{name}ForConditionalGeneration is not supported: .*{REFUSED[name]}"
    ):
        towers.apply(model, 0.5)
    assert str(model) == before


def test_every_name_is_one_of_transformers() -> None:
    modules = {name: getattr(transformers, name, None) for name in (*KINDS, *REASONS)}
    assert [name for name, found in modules.items() if found is None] == []


def test_other_models_are_refused() -> None:
    with pytest.raises(
        ValueError, match="knows those whose projector works token by token, and of these Llava"
    ):
        towers.apply(transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT)), 0.5)
    with pytest.raises(ValueError, match=r"a vision transformer by itself is evit_ext.apply's"):
        towers.apply(transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**TOWER)), 0.5)
    with pytest.raises(TypeError, match="model must be a language model of transformers"):
        towers.apply("llava", 0.5)  # type: ignore[type-var]


def test_a_language_model_is_told_of_towers_apply() -> None:
    with pytest.raises(ValueError, match=r"expects a token for every patch: evit_ext\.towers\.apply"):
        evit_ext.apply(LINES["LLaVA"].build(), 0.5)


@pytest.mark.parametrize(
    ("line", "change", "message"),
    [
        ("LLaVA", {"vision_feature_layer": [-2, -1]}, "the features of several layers, which must all"),
        ("LLaVA", {"vision_feature_layer": 0}, "must be the output of one of the tower's 4 blocks"),
        ("LLaVA", {"vision_feature_layer": -6}, "must be the output of one of the tower's 4 blocks"),
        ("LLaVA, SigLIP", {"vision_feature_select_strategy": "default"}, "is a patch, as its tower has no"),
        ("LLaVA-NeXT", {"vision_feature_select_strategy": "full"}, "1 tokens besides the patches in each"),
    ],
)
def test_configurations_that_do_not_fit(line: str, change: dict[str, Any], message: str) -> None:
    model = LINES[line].build()
    for name, value in change.items():
        setattr(model.config, name, value)
    with pytest.raises(ValueError, match=message):
        towers.apply(model, 0.5)


def test_settings_that_do_not_fit() -> None:
    model = LINES["LLaVA"].build()
    before = str(model)
    for arguments, message in (
        ({"mode": "outside"}, "mode must be 'select' or 'inside', got 'outside'"),
        ({"drop_loc": (1,)}, "drop_loc is for mode='inside'"),
        ({"mode": "inside", "drop_loc": (1, 3)}, r"must not lie behind block 2, .* got \(1, 3\)"),
        ({"keep_rate": 2.0}, "keep_rate must be in"),
    ):
        with pytest.raises(ValueError, match=message):
            towers.apply(model, **arguments)  # type: ignore[arg-type]
    assert str(model) == before
    towers.apply(model, 0.5)
    with pytest.raises(ValueError, match="reorganises tokens already"):
        towers.apply(model, 0.5)


def test_unsupported_towers() -> None:
    config = transformers.LlavaConfig(
        vision_config=transformers.PixtralVisionConfig(**{**TOWER, "head_dim": 12}),
        text_config=transformers.LlamaConfig(**TEXT),
    )
    model = transformers.LlavaForConditionalGeneration(config)
    with pytest.raises(
        ValueError, match="PixtralVisionModel is not supported: of transformers, evit_ext knows"
    ):
        towers.apply(model, 0.5)


@pytest.mark.parametrize(
    ("line", "attribute", "value"),
    [
        ("LLaVA", "patch_size", 16),
        ("LLaVA", "vision_feature_select_strategy", "full"),
        ("LLaVA", "image_token_id", 7),
        ("PaliGemma", "image_seq_length", 64),
        ("LLaVA-OneVision", "num_image_tokens", 9),
    ],
)
def test_processors_of_other_models(line: str, attribute: str, value: Any) -> None:
    model, processor = LINES[line].build(), LINES[line].processor()
    setattr(processor, attribute, value)
    before = str(model)
    with pytest.raises(ValueError, match=f"its {attribute} is {value}, and that of the model"):
        towers.apply(model, 0.5, processor=processor)
    assert str(model) == before


def test_processors_of_other_kinds() -> None:
    model, processor = LINES["LLaVA-NeXT"].build(), LINES["LLaVA-NeXT"].processor()
    with pytest.raises(TypeError, match="processor must be the model's, a LlavaNextProcessor, got LlavaProc"):
        towers.apply(model, 0.5, processor=LINES["LLaVA"].processor())
    with pytest.raises(TypeError, match="got str"):
        towers.apply(model, 0.5, processor="processor")
    processor.image_processor.image_grid_pinpoints = [[32, 64]]
    with pytest.raises(ValueError, match="its image_grid_pinpoints is"):
        towers.apply(model, 0.5, processor=processor)
    with pytest.raises(ValueError, match="has no block that reorganises tokens"):
        towers.write_placeholders(LINES["LLaVA-NeXT"].processor(), model)


class Wrapper(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def test_inside_wrappers() -> None:
    line = LINES["LLaVA"]
    model, processor = line.build(), line.processor()
    towers.apply(model.model, 0.5)
    wrapped = Wrapper(model)
    towers.write_placeholders(processor, wrapped)
    assert towers.num_image_tokens(wrapped) == 8
    batch = inputs(processor, ["<image> ?"], [photo(32, 32)])
    with torch.no_grad():
        assert wrapped.module(**batch).logits.shape[1] == 8 + 1
    assert evit_ext.remove(wrapped) is wrapped
    assert str(model) == str(line.build()) and "get_placeholder_mask" not in vars(model.model)
