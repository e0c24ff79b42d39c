"""Language models whose images have fewer tokens: compared with a slow version, and what still works."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from slow_language_model import features, logits, packed
from small_language_models import (
    LINES,
    Line,
    inputs,
    num_placeholders,
    photo,
    transformers,
)
from torch import Tensor

import evit_ext
from evit_ext import towers
from evit_ext.tokens import EViT, RandomSelection

PROMPT = "<image> what is here ?"
lines = pytest.mark.parametrize("line", LINES.values(), ids=LINES)


def made(line: Line, processor: Any, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """Two texts with an image each, which are cut into 1 × 2 and 2 × 2 tiles, or into none."""
    images = [photo(30, 64), photo(60, 56, seed=1)]
    batch = inputs(processor, [PROMPT, "word1 word2 <image> is there ?"], images)
    return {name: value.to(dtype) if name == "pixel_values" else value for name, value in batch.items()}


def slow_tokens(
    line: Line, model: Any, batch: dict[str, Any], stages: dict[int, float], after: bool, fuse: bool
) -> Tensor:
    """The tokens of all images, [L, C]."""
    inner, pixels = model.model, batch["pixel_values"]
    tiles = [(1, 2), (2, 2)] if line.tiles else []
    if line.tiles:
        pixels = torch.cat(
            [one[: 1 + rows * columns] for one, (rows, columns) in zip(pixels, tiles, strict=True)]
        )
    x = features(inner.vision_tower, pixels, line.block, line.prefix, stages, after, fuse)
    if line.name == "PaliGemma":
        x = inner.vision_tower.post_layernorm(x)
    elif inner.config.vision_feature_select_strategy == "default":
        x = x[:, 1:]
    x = inner.multi_modal_projector(x)
    if not line.tiles:
        return x.flatten(0, 1)
    images = x.split([1 + rows * columns for rows, columns in tiles])
    return torch.cat(
        [packed(one, shape, inner.image_newline) for one, shape in zip(images, tiles, strict=True)]
    )


@lines
@pytest.mark.parametrize("mode", ["select", "inside"])
@pytest.mark.parametrize("fuse", [False, True])
def test_equals_the_slow_version(line: Line, mode: str, fuse: bool) -> None:
    model, unchanged, processor = line.build(torch.float64), line.build(torch.float64), line.processor()
    stages = {line.block: 0.4} if mode == "select" else {0: 0.8, 2: 0.6}
    place: dict[str, Any] = {} if mode == "select" else {"mode": mode, "drop_loc": tuple(stages)}
    towers.apply(model, list(stages.values()), fuse, processor=processor, **place)
    batch = made(line, processor)
    with torch.no_grad():
        expected = slow_tokens(line, unchanged, batch, stages, mode == "select", fuse)
        found = model(**batch).logits
        torch.testing.assert_close(found, logits(unchanged, batch, expected), rtol=1e-9, atol=1e-9)
    assert sum(num_placeholders(batch)) == len(expected)


@lines
@pytest.mark.parametrize("mode", ["select", "inside"])
def test_all_patches_are_the_unchanged_model(line: Line, mode: str) -> None:
    model, processor = line.build(), line.processor()
    batch = made(line, processor, torch.float32)
    with torch.no_grad():
        before = model(**batch).logits
        towers.apply(model, 1, mode=mode, processor=processor)
        again = made(line, processor, torch.float32)
        assert num_placeholders(again) == num_placeholders(batch)
        assert torch.equal(model(**again).logits, before)
        evit_ext.set_keep_rate(model, 0.5)
        towers.write_placeholders(processor, model)
        fewer = made(line, processor, torch.float32)
        assert sum(num_placeholders(fewer)) < sum(num_placeholders(batch))
        assert not torch.equal(model(**fewer).logits[:, -1], before[:, -1])
        assert towers.remove(model, processor) is model
        again = made(line, processor, torch.float32)
        assert torch.equal(again["input_ids"], batch["input_ids"])
        assert torch.equal(model(**again).logits, before)
    fresh, hooked = line.build(), {"_output_capturing_hooks_installed"}
    for one, other in zip(model.modules(), fresh.modules(), strict=True):
        assert type(one) is type(other) and set(vars(one)) - hooked == set(vars(other))


@lines
@pytest.mark.parametrize("mode", ["select", "inside"])
def test_generates_with_and_without_a_cache(line: Line, mode: str) -> None:
    model, processor = line.build(torch.float64), line.processor()
    towers.apply(model, 0.5, mode=mode, processor=processor)
    batch = made(line, processor)
    settings: dict[str, Any] = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    settings["suppress_tokens"] = [model.config.image_token_id]  # no image belongs to one that it would write
    cached = model.generate(**batch, **settings, use_cache=True)
    assert cached.shape[1] == batch["input_ids"].shape[1] + 8
    assert torch.equal(cached, model.generate(**batch, **settings, use_cache=False))


@lines
@pytest.mark.parametrize("checkpointing", [False, True])
def test_trains(line: Line, checkpointing: bool) -> None:
    model, processor = line.build(), line.processor()
    towers.apply(model, 0.5, True, processor=processor)
    if checkpointing:
        model.gradient_checkpointing_enable()
    batch = made(line, processor, torch.float32)
    model.train()
    model.model.vision_tower.requires_grad_(True)
    model(**batch, labels=batch["input_ids"]).loss.backward()
    query = model.model.vision_tower.encoder.layers[line.block].self_attn.q_proj.weight
    assert torch.isfinite(query.grad).all() and query.grad.abs().sum() > 0


def test_any_rule() -> None:
    model, processor = LINES["LLaVA"].build(), LINES["LLaVA"].processor()
    towers.apply(model, rule=RandomSelection(0.25), processor=processor)
    batch = made(LINES["LLaVA"], processor, torch.float32)
    assert num_placeholders(batch) == [4, 4] and towers.num_image_tokens(model) == 4
    with torch.no_grad(), evit_ext.record_tokens(model) as record:
        model(**batch)
    assert record.kept[0].shape == (2, 4)
    assert "rule=RandomSelection" in str(model) and "after_mlp=True" in str(model)


def test_record_puts_tokens_back_on_the_grid() -> None:
    line = LINES["LLaVA"]
    model, processor = line.build(), line.processor()
    towers.apply(model, 0.5, processor=processor)
    seen: list[Tensor] = []
    layer = model.model.vision_tower.encoder.layers[line.block]
    layer.register_forward_hook(lambda module, args, out: seen.append(out))
    with torch.no_grad(), evit_ext.record_tokens(model) as record:
        model(**made(line, processor, torch.float32))
    grid = record.restore(seen[0], num_prefix_tokens=1)
    for image, kept, tokens in zip(grid, record.kept[0], seen[0], strict=True):
        assert torch.equal(image[kept], tokens[1:])
        assert int((image.abs().sum(dim=1) > 0).sum()) == 8


@lines
def test_placeholders_of_several_images_and_texts(line: Line) -> None:
    model, processor = line.build(), line.processor()
    towers.apply(model, 0.3, True, processor=processor)
    each = 5 + 1 + (1 if "class token" in str(id_of(line)) else 0)
    texts = ["<image> and <image> what ?", "<image> ?"]
    images = [[photo(30, 64), photo(60, 60, 1)], [photo(90, 28, 2)]]
    batch = inputs(processor, texts, images)
    if line.name in ("LlavaNext", "LlavaNextVideo"):
        expected = [each * 3 + 1 + each * 5 + 2, each * 4 + 3]
    elif line.name == "LlavaOnevision":  # several images of a text are not cut into tiles
        expected = [2 * (each + 1), each * 4 + 3]
    else:
        expected = [2 * each, each]
    assert num_placeholders(batch) == expected
    with torch.no_grad():
        assert torch.isfinite(model(**batch).logits).all()
    sizes = [(30, 64), (60, 60), (90, 28)]
    counts = processor._get_num_multimodal_tokens(image_sizes=sizes)["num_image_tokens"]
    assert counts == ([each * 3 + 1, each * 5 + 2, each * 4 + 3] if line.tiles else [each] * 3)


def id_of(line: Line) -> str:
    return next(name for name, one in LINES.items() if one is line)


def test_padding_of_other_texts_has_no_say() -> None:
    line = LINES["LLaVA"]
    model, processor = line.build(torch.float64), line.processor()
    towers.apply(model, 0.5, processor=processor)
    both = made(line, processor)
    alone = inputs(processor, [PROMPT], [photo(30, 64)])
    with torch.no_grad():
        expected = model(**{**alone, "pixel_values": alone["pixel_values"].double()}).logits[0]
        found = model(**both).logits[0, -len(expected) :]
    # Llama rotates by angles in float32, and padding shifts them: 2e-6 apart.
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@lines
def test_wrong_numbers_get_a_sentence(line: Line) -> None:
    model, processor = line.build(), line.processor()
    towers.apply(model, 0.5)
    batch = made(line, processor, torch.float32)
    with pytest.raises(ValueError, match=r"placeholders .*write_placeholders\(processor, model\)"):
        model(**batch)
    with pytest.raises(ValueError, match="write_placeholders"):
        model.generate(**batch, max_new_tokens=2)
    with pytest.raises(ValueError, match=r"the processor counts 1\d tokens, and the model makes"):
        towers.check_placeholders(processor, model)
    towers.write_placeholders(processor, model)
    towers.check_placeholders(processor, model)
    evit_ext.set_keep_rate(model, 0.8)
    with pytest.raises(ValueError, match="write_placeholders"):
        towers.check_placeholders(processor, model)
    towers.remove(model)
    with pytest.raises(ValueError, match="restore_placeholders"):
        towers.check_placeholders(processor, model)
    towers.restore_placeholders(processor)
    towers.check_placeholders(processor, model)


def test_as_many_tokens_as_patches_are_no_grid() -> None:
    # 15 kept patches and a fused token.
    line = LINES["LLaVA-NeXT"]
    model, processor = line.build(torch.float64), line.processor()
    towers.apply(model, 15 / 16, True, processor=processor)
    batch = made(line, processor)
    assert num_placeholders(batch) == [16 * 3 + 1, 16 * 5 + 2]
    unchanged = line.build(torch.float64)
    with torch.no_grad():
        expected = slow_tokens(line, unchanged, batch, {line.block: 15 / 16}, True, True)
        torch.testing.assert_close(
            model(**batch).logits, logits(unchanged, batch, expected), rtol=1e-9, atol=1e-9
        )


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_copies_of_processors_write_the_same(copied: Any) -> None:
    line = LINES["LLaVA"]
    model, processor = line.build(), line.processor()
    towers.apply(model, 0.5, processor=processor)
    other = copied(processor)
    towers.restore_placeholders(processor)
    assert num_placeholders(made(line, other)) == [8, 8]
    assert num_placeholders(made(line, processor)) == [16, 16]
    assert other.__dict__["replace_image_token"].module is other


def test_a_saved_processor_is_as_transformers_made_it(tmp_path: Any) -> None:
    line = LINES["LLaVA"]
    model, processor = line.build(), line.processor()
    towers.apply(model, 0.5, processor=processor)
    processor.save_pretrained(tmp_path)
    loaded = transformers.LlavaProcessor.from_pretrained(tmp_path)
    assert num_placeholders(made(line, loaded)) == [16, 16]
    assert "replace_image_token" not in (tmp_path / "processor_config.json").read_text()


def test_saved_models_are_transformers_own(tmp_path: Any) -> None:
    model = LINES["LLaVA"].build()
    names = set(model.state_dict())
    towers.apply(model, 0.5)
    assert set(model.state_dict()) == names
    model.save_pretrained(tmp_path)
    loaded = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    towers.apply(loaded, rule=EViT(0.5))


@pytest.mark.parametrize("name", ["LLaVA-OneVision", "LLaVA-NeXT-Video"])
def test_videos_need_all_patches(name: str) -> None:
    line = LINES[name]
    model = towers.apply(line.build(), 0.5)
    video = torch.randn(1, 2, 3, 32, 32)
    with pytest.raises(ValueError, match="videos are not supported while patches are dropped"):
        model.get_video_features(video)
    evit_ext.set_keep_rate(model, 1)
    with torch.no_grad():
        found = model.get_video_features(video).pooler_output
        assert torch.equal(found, line.build().get_video_features(video).pooler_output)


@pytest.mark.parametrize("rate", [1.0, 0.5])
@pytest.mark.parametrize("name", ["LLaVA-NeXT", "LLaVA-NeXT-Video", "LLaVA-OneVision"])
def test_arguments_by_place_are_those_by_name(name: str, rate: float) -> None:
    line = LINES[name]
    model, processor = line.build(), line.processor()
    towers.apply(model, rate, processor=processor)
    inner, sizes = model.model, torch.tensor([[30, 64], [28, 28]])
    features = [torch.randn(1 + tiles, round(16 * rate), 32) for tiles in (2, 0)]
    middle = () if line.name == "LlavaOnevision" else ("default",)
    newline = inner.image_newline.detach()
    names = {} if line.name == "LlavaOnevision" else {"vision_feature_select_strategy": "default"}
    by_place, lengths = inner.pack_image_features(features, sizes, *middle, newline)
    by_name, _ = inner.pack_image_features(
        image_features=features, image_sizes=sizes, image_newline=newline, **names
    )
    without, fewer = inner.pack_image_features(features, sizes, *middle)
    assert all(map(torch.equal, by_place, by_name)) and (fewer < lengths).all()
    assert any(torch.equal(token, newline) for token in by_place[0])
    assert not any(torch.equal(token, newline) for token in without[0])
    with pytest.raises(TypeError, match="newlines"):
        inner.pack_image_features(features, sizes, *middle, newlines=newline)
    if line.name == "LlavaNext":
        return
    # The fourth argument of the mask are the features of videos.
    ids = torch.tensor([[5, 6, 5, 5]])
    embeddings = inner.get_input_embeddings()(ids)
    _, mask = inner.get_placeholder_mask(ids, embeddings, None, torch.zeros(3, 32))
    assert mask[0, :, 0].tolist() == [True, False, True, True]
    sizes_of_images = [(30, 64)]
    counts = [
        processor._get_num_multimodal_tokens(sizes_of_images),
        processor._get_num_multimodal_tokens(image_sizes=sizes_of_images),
    ]
    assert counts[0].num_image_tokens == counts[1].num_image_tokens
