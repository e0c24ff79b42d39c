"""load_checkpoint: what does not fit, and what is fitted on request."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from checkpoint_files import (
    assert_loaded,
    deit_file,
    distilled_file,
    draw,
    dynamicvit,
    dynamicvit_file,
    evit,
    images,
    lvvit,
    lvvit_file,
    refused,
    saved,
    vit,
)
from slow_evit import slow_bicubic
from timm.layers import resample_abs_pos_embed
from timm.models.deit import VisionTransformerDistilled
from torch import nn

from evit_ext.weights import load_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")


def test_another_architecture_is_said_in_a_sentence(tmp_path: Path) -> None:
    deit, lv = saved(tmp_path, deit_file(), "deit.pth"), saved(tmp_path, lvvit_file(), "lv.pth")
    distilled = saved(tmp_path, distilled_file(), "distilled.pth")
    for strict in (True, False):
        for model in (evit(), dynamicvit(), vit()):
            said = refused(model, lv, strict=strict)
            assert "those of an LV-ViT, whose stem of convolutions" in said and "\n" not in said
            said = refused(model, distilled, strict=strict)
            assert "those of a distilled DeiT" in said and "deit_small_distilled()" in said
        assert "LVViT is an LV-ViT, and the weights, those of a ViT, have no stem" in refused(
            lvvit(), deit, strict=strict
        )
        said = refused(vit(VisionTransformerDistilled), deit, strict=strict)
        assert "VisionTransformerDistilled is distilled, and the weights, those of a ViT, have no" in said


def test_another_size_is_said_in_a_sentence(tmp_path: Path) -> None:
    file = saved(tmp_path, deit_file(c=32, mlp=128))
    expected = "they have 32 channels and 4 blocks, DeiT has 24 and 4"
    assert refused(evit(), file, strict=False).endswith(expected)
    file = saved(tmp_path, deit_file(depth=12))
    assert refused(evit(), file).endswith("they have 24 channels and 12 blocks, DeiT has 24 and 4")
    said = refused(evit(), saved(tmp_path, deit_file(channels=1)))
    assert "for images of 1 channels, DeiT is for 3: patch_embed.proj.weight has shape 24×1×8×8" in said
    said = refused(lvvit(in_chans=1), saved(tmp_path, lvvit_file()))
    assert "for images of 3 channels, LVViT is for 1: patch_embed.conv1.weight" in said
    said = refused(lvvit(stem_dim=8), saved(tmp_path, lvvit_file()))
    assert "of another shape or type: patch_embed.bn1.bias 6, not 8" in said


def test_weights_of_something_else(tmp_path: Path) -> None:
    file = saved(tmp_path, timm.create_model("resnet18").state_dict())
    for strict in (True, False):
        said = refused(evit(), file, strict=strict)
        assert "none of the weights' 122 keys is one of DeiT's 56: they begin with conv1.weight" in said


def test_missing_and_unexpected_keys(tmp_path: Path) -> None:
    state = deit_file()
    for key in ("norm.weight", "norm.bias"):
        del state[key]
    file = saved(tmp_path, {"model": {**state, **draw({f"extra.{i}": (1,) for i in range(13)})}})
    model = evit()
    said = refused(model, file).split("\n")
    assert said[0] == f"{file} does not fit DeiT:"
    assert said[1] == "  - missing in the file: norm.weight, norm.bias"
    shown = ", ".join(f"extra.{i}" for i in range(10))
    assert said[2:] == [f"  - not in the model: {shown} and 3 more"]
    nn.init.constant_(model.norm.weight, 3.0)
    loaded = load_checkpoint(model, file, strict=False)
    assert loaded.missing_keys == ("norm.weight", "norm.bias")
    assert len(loaded.unexpected_keys) == 13
    assert (model.norm.weight == 3).all() and torch.equal(model.head.bias, state["head.bias"])
    lines = str(loaded).splitlines()
    assert lines[1] == "  as they were, missing in the file: norm.weight, norm.bias"
    assert lines[2] == f"  in the file, not loaded: {shown} and 3 more"


def test_all_that_does_not_fit_is_said_at_once(tmp_path: Path) -> None:
    state = deit_file(classes=7, tokens=26)
    state["norm.weight"] = torch.ones(25)
    state["norm.bias"] = torch.ones(24, dtype=torch.int8)
    state["blocks.0.extra"] = torch.ones(1)
    file = saved(tmp_path, state)
    assert refused(evit(), file).split("\n")[1:] == [
        "  - pos_embed has 26 tokens (5 × 5 patches and 1 other), the model's 17 (4 × 4 patches and 1 "
        "other): resize_pos_embed=True resizes it",
        "  - head: for 7 classes in the file, for 5 classes in the model; resize_head=True keeps what the "
        "model has",
        "  - of another shape or type: norm.bias torch.int8, not torch.float32, norm.weight 25, not 24",
        "  - not in the model: blocks.0.extra",
    ]
    said = refused(evit(), file, strict=False, resize_head=True, resize_pos_embed=True)
    assert said.split("\n")[1:] == [
        "  - of another shape or type: norm.bias torch.int8, not torch.float32, norm.weight 25, not 24"
    ]


def test_entries_that_are_no_tensors(tmp_path: Path) -> None:
    file = saved(tmp_path, {"model": {**deit_file(), "step": 3}})
    model = evit()
    assert "  - not in the model: step" in refused(model, file)
    assert load_checkpoint(model, file, strict=False).unexpected_keys == ("step",)
    bare = saved(tmp_path, {**deit_file(), "epoch": 3})
    assert load_checkpoint(model, bare).epoch == 3


# --- on request: heads


@pytest.mark.parametrize("kind", ["evit", "distilled", "lvvit", "dynamicvit"])
def test_heads_for_other_classes(tmp_path: Path, kind: str) -> None:
    model, state, heads = {
        "evit": lambda: (evit(num_classes=7), deit_file(), ["head"]),
        "distilled": lambda: (
            vit(VisionTransformerDistilled, num_classes=7),
            distilled_file(),
            ["head", "head_dist"],
        ),
        "lvvit": lambda: (lvvit(num_classes=7), lvvit_file(), ["head", "aux_head"]),
        "dynamicvit": lambda: (dynamicvit(num_classes=7), dynamicvit_file(), ["head"]),
    }[kind]()
    file = saved(tmp_path, {"model": state})
    said = refused(model, file)
    for head in heads:
        assert f"{head}: for 5 classes in the file, for 7 classes in the model; resize_head=True" in said
    before = {key: value.clone() for key, value in model.state_dict().items()}
    loaded = load_checkpoint(model, file, resize_head=True)
    keys = tuple(f"{head}.{name}" for head in heads for name in ("weight", "bias"))
    assert loaded.head_keys == keys and not loaded.missing_keys and not loaded.unexpected_keys
    assert_loaded(model, {**state, **{key: before[key] for key in keys}})
    assert f"head as it was, for other classes: {', '.join(keys)}" in str(loaded)


def test_a_head_on_one_side_only(tmp_path: Path) -> None:
    file, model = saved(tmp_path, deit_file()), evit(num_classes=0)
    assert refused(model, file).endswith(
        "head: for 5 classes in the file, none in the model; resize_head=True leaves it out"
    )
    loaded = load_checkpoint(model, file, resize_head=True)
    assert loaded.unexpected_keys == ("head.weight", "head.bias") and not loaded.head_keys
    headless = {key: value for key, value in deit_file().items() if not key.startswith("head.")}
    file = saved(tmp_path, headless)
    assert "head: none in the file, for 5 classes in the model" in refused(evit(), file)
    assert load_checkpoint(evit(), file, resize_head=True).head_keys == ("head.weight", "head.bias")
    # Where it fits, it is loaded all the same.
    loaded = load_checkpoint(model := evit(), saved(tmp_path, deit_file()), resize_head=True)
    assert loaded.head_keys == ()
    assert_loaded(model, deit_file())


# --- on request: position embeddings


@pytest.mark.parametrize("build", [evit, dynamicvit, lvvit])
def test_position_embedding_of_this_packages_models(tmp_path: Path, build: Any) -> None:
    """Resized as published, from another square to a grid that is none."""
    state = {evit: deit_file, dynamicvit: dynamicvit_file, lvvit: lvvit_file}[build]()
    model = build(img_size=(48, 40))
    file = saved(tmp_path, {"model": state})
    said = refused(model, file)
    assert (
        "pos_embed has 17 tokens (4 × 4 patches and 1 other), the model's 31 (6 × 5 patches and 1 other): "
        "resize_pos_embed=True resizes it"
    ) in said
    loaded = load_checkpoint(model, file, resize_pos_embed=True)
    assert loaded.resized_keys == ("pos_embed",)
    assert "  resized: pos_embed" in str(loaded)
    embedding = state["pos_embed"]
    assert torch.equal(model.pos_embed[:, 0], embedding[:, 0])
    expected = slow_bicubic(embedding[0, 1:].double(), 6, 5)
    torch.testing.assert_close(model.pos_embed[0, 1:].double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(model.blocks[1].mlp.fc1.weight, state["blocks.1.mlp.fc1.weight"])
    model(images(48, 40))


@pytest.mark.parametrize(
    ("arguments", "prefix"),
    [
        ({}, 1),
        ({"no_embed_class": True}, 0),
        ({"cls": VisionTransformerDistilled}, 2),
        ({"reg_tokens": 2}, 3),
    ],
)
def test_position_embedding_of_timms_models(tmp_path: Path, arguments: Any, prefix: int) -> None:
    source, model = vit(**arguments), vit(**{**arguments, "img_size": 48})
    nn.init.normal_(source.pos_embed)
    file = saved(tmp_path, source.state_dict())
    others = f"{prefix} other{'' if prefix == 1 else 's'}"
    assert f"(4 × 4 patches and {others}), the model's {36 + prefix} (6 × 6" in refused(model, file)
    load_checkpoint(model, file, resize_pos_embed=True)
    expected = resample_abs_pos_embed(source.pos_embed, [6, 6], num_prefix_tokens=prefix)
    assert torch.equal(model.pos_embed, expected)
    assert not torch.equal(model.pos_embed, vit(**{**arguments, "img_size": 48}).pos_embed)


@pytest.mark.parametrize("build", [evit, vit])
def test_grids_that_are_no_square(tmp_path: Path, build: Any) -> None:
    source, model = build(img_size=(24, 64)), build(img_size=48)
    nn.init.normal_(source.pos_embed)
    file = saved(tmp_path, source.state_dict())
    assert "pos_embed has 25 tokens, the model's 37 (6 × 6 patches and 1 other)" in refused(model, file)
    said = refused(model, file, resize_pos_embed=True)
    assert "pos_embed has 25 tokens, which are no square of patches and 1 other: give their grid" in said
    said = refused(model, file, resize_pos_embed=(4, 5))
    assert "says 4 × 5 patches; with 1 other these are 21" in said
    load_checkpoint(model, file, resize_pos_embed=(3, 8))
    tall = build(img_size=48)
    load_checkpoint(tall, file, resize_pos_embed=(8, 3))
    assert not torch.allclose(model.pos_embed, tall.pos_embed)


@pytest.mark.parametrize("build", [evit, vit])
def test_as_many_patches_in_another_grid(tmp_path: Path, build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    source = build(img_size=(16, 64))
    nn.init.normal_(source.pos_embed)
    file = saved(tmp_path, source.state_dict())
    model = build()
    load_checkpoint(model, file, resize_pos_embed=True)  # nobody can see that it is 2 × 8
    assert torch.equal(model.pos_embed, source.pos_embed)
    loaded = load_checkpoint(model, file, resize_pos_embed=(2, 8))
    assert loaded.resized_keys == ("pos_embed",)
    assert not torch.allclose(model.pos_embed, source.pos_embed)
    # Older timms do nothing here.
    monkeypatch.setattr("evit_ext.weights.fitting.resample_abs_pos_embed", lambda embedding, **_: embedding)
    load_checkpoint(model, file, resize_pos_embed=(2, 8))
    assert not torch.allclose(model.pos_embed, source.pos_embed)
    same = build(img_size=(16, 64))
    assert load_checkpoint(same, file, resize_pos_embed=(2, 8)).resized_keys == ()
    assert torch.equal(same.pos_embed, source.pos_embed)


def test_a_grid_for_a_model_without_one(tmp_path: Path) -> None:
    file = saved(tmp_path, timm.create_model("resnet18").state_dict())
    said = refused(timm.create_model("resnet18"), file, resize_pos_embed=(2, 8))
    assert "is for timm's VisionTransformer with a position embedding, not for ResNet" in said
