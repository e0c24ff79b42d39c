"""load_checkpoint: files as the publications wrote them, and where in them the weights are."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from checkpoint_files import (
    MICRO,
    assert_loaded,
    deit_file,
    distilled_file,
    draw,
    dynamicvit,
    dynamicvit_file,
    evit,
    images,
    linear,
    lvvit,
    lvvit_file,
    refused,
    saved,
    training_file,
    vit,
)
from safetensors.torch import save_file
from timm.models.deit import VisionTransformerDistilled
from torch import nn

import evit_ext
from evit_ext.training import Recipe, Trainer
from evit_ext.weights import LoadedCheckpoint, load_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("protocol", ["zip", "legacy"])
def test_deit(tmp_path: Path, protocol: str) -> None:
    state, model = deit_file(), evit()
    file = saved(tmp_path, {"model": state}, _use_new_zipfile_serialization=protocol == "zip")
    loaded = evit_ext.load_checkpoint(model, file)
    assert_loaded(model, state)
    assert loaded == LoadedCheckpoint(
        str(file), "ViT", "model", False, (), None, tuple(loaded.loaded_keys), (), (), (), ()
    )
    assert set(loaded.loaded_keys) == set(state)
    assert str(loaded) == f"{file}: ViT weights (entry 'model'), {len(state)} tensors loaded"


@pytest.mark.parametrize("zip_format", [True, False])
def test_evit_with_all_that_its_training_saves(tmp_path: Path, zip_format: bool) -> None:
    content = training_file()
    file = saved(tmp_path, content, _use_new_zipfile_serialization=zip_format)
    model = evit()
    loaded = load_checkpoint(model, str(file))
    assert_loaded(model, content["model"])
    assert (loaded.kind, loaded.entry, loaded.is_ema, loaded.epoch) == ("EViT", "model", False, 29)
    assert loaded.unused_entries == ("model_ema",)
    assert str(loaded).splitlines()[1] == "  other weights in the file, see use_ema: model_ema"
    averaged = load_checkpoint(model, file, use_ema=True)
    assert_loaded(model, content["model_ema"])
    assert (averaged.entry, averaged.is_ema, averaged.unused_entries) == ("model_ema", True, ("model",))
    assert "(entry 'model_ema', a moving average, epoch 29)" in str(averaged)


def test_pre_logits_of_old_timm_are_left_out(tmp_path: Path) -> None:
    state = {**deit_file(), **draw(linear("pre_logits.fc", 24, 24))}
    load_checkpoint(model := evit(), saved(tmp_path, {"model": state}))
    assert_loaded(model, deit_file())


def test_deit3_scales(tmp_path: Path) -> None:
    """DeiT III calls its layer scale gamma_1; timm calls it ls1.gamma."""
    state = deit_file(tokens=16)
    for i in range(4):
        state |= draw({f"blocks.{i}.gamma_1": (24,), f"blocks.{i}.gamma_2": (24,)}, seed=i)
    file = saved(tmp_path, {"model": state})
    for model in (vit(no_embed_class=True, init_values=1e-6), evit(no_embed_class=True, init_values=1e-6)):
        loaded = load_checkpoint(model, file)
        assert torch.equal(model.blocks[2].ls2.gamma, state["blocks.2.gamma_2"])
        assert (loaded.missing_keys, loaded.unexpected_keys) == ((), ())


def test_distilled(tmp_path: Path) -> None:
    state = distilled_file()
    model = evit_ext.apply(vit(VisionTransformerDistilled))
    loaded = load_checkpoint(model, saved(tmp_path, {"model": state}))
    assert_loaded(model, state)
    assert loaded.kind == "distilled DeiT"


@pytest.mark.parametrize("nesting", [None, "state_dict"])
def test_lvvit(tmp_path: Path, nesting: str | None) -> None:
    state = lvvit_file()
    content: Any = {f"module.{k}": v for k, v in state.items()} if nesting else state
    file = saved(tmp_path, {nesting: content} if nesting else content, "lvvit_s.pth.tar")
    loaded = load_checkpoint(model := lvvit(), file)
    assert_loaded(model, state)
    assert loaded.kind == "LV-ViT"
    assert model.patch_embed.bn1.num_batches_tracked == 100


def test_lvvit_without_its_auxiliary_head(tmp_path: Path) -> None:
    model = lvvit(return_dense=False, mix_token=False)
    loaded = load_checkpoint(model, saved(tmp_path, lvvit_file()))
    assert loaded.unexpected_keys == ("aux_head.weight", "aux_head.bias")
    assert torch.equal(model.head.weight, lvvit_file()["head.weight"])
    plain = {key: value for key, value in lvvit_file().items() if not key.startswith("aux_head.")}
    said = refused(lvvit(), saved(tmp_path, plain))
    assert said.endswith(
        "  - aux_head: none in the file, for 5 classes in the model; resize_head=True keeps what the model "
        "has"
    )


def test_dynamicvit(tmp_path: Path) -> None:
    state, model = dynamicvit_file(), dynamicvit()
    loaded = load_checkpoint(model, saved(tmp_path, {"model": state, "epoch": 29}))
    assert_loaded(model, state)
    assert (loaded.kind, loaded.epoch) == ("DynamicViT", 29)


def test_deits_weights_into_a_dynamicvit(tmp_path: Path) -> None:
    model, state = dynamicvit(), deit_file()
    predictors = {key: v.clone() for key, v in model.state_dict().items() if key.startswith("score_")}
    loaded = load_checkpoint(model, saved(tmp_path, {"model": state}))
    assert_loaded(model, {**state, **predictors})
    assert set(loaded.missing_keys) == set(predictors)
    # A file with some predictors, but not all, is another matter.
    some = {k: v for k, v in dynamicvit_file().items() if not k.startswith("score_predictor.2")}
    assert "missing in the file: score_predictor.2.in_conv.0.weight" in refused(model, saved(tmp_path, some))


def test_a_dynamicvits_weights_into_an_evit(tmp_path: Path) -> None:
    file, model = saved(tmp_path, {"model": dynamicvit_file()}), evit()
    said = refused(model, file)
    assert said == (
        f"{file} does not fit: the weights are those of a DynamicViT, whose score predictors DeiT does not "
        "have: strict=False loads all but those; evit_ext.models.dynamicvit_small builds a model that has "
        "them"
    )
    loaded = load_checkpoint(model, file, strict=False)
    assert_loaded(model, deit_file())
    assert len(loaded.unexpected_keys) == 30 and loaded.unexpected_keys[0].startswith("score_predictor.")


def test_timms_training(tmp_path: Path) -> None:
    """What timm's CheckpointSaver writes: prefixes, moving average, arguments."""
    state = deit_file()
    content = {
        "epoch": 3,
        "arch": "vit_tiny_patch16_224",
        "state_dict": {f"module.{key}": value for key, value in state.items()},
        "state_dict_ema": {f"_orig_mod.module.{key}": value - 1 for key, value in state.items()},
        "optimizer": {"state": {}, "param_groups": [{"lr": 0.1, "betas": (0.9, 0.999)}]},
        "version": 2,
        "args": argparse.Namespace(model="vit_tiny_patch16_224"),
        "amp_scaler": {},
        "metric": 71.25,
    }
    file = saved(tmp_path, content, "last.pth.tar")
    loaded = load_checkpoint(model := vit(), file)
    assert_loaded(model, state)
    assert (loaded.entry, loaded.epoch, loaded.kind) == ("state_dict", 3, "ViT")
    load_checkpoint(model, file, use_ema=True)
    assert_loaded(model, {key: value - 1 for key, value in state.items()})


def test_our_own(tmp_path: Path) -> None:
    """Trained by the Trainer, saved with torch.save or safetensors, loaded before apply or after."""
    recipe = Recipe(epochs=1, warmup_epochs=0, lr=0.01, ema_decay=0.9, keep_rate=0.7)
    trainer = Trainer(evit(), recipe, steps_per_epoch=1)
    trainer.train_one_epoch([(images(), torch.tensor([1, 2]))], progress=False)
    source = trainer.model.eval()
    save_file(source.state_dict(), tmp_path / "model.safetensors", {"keep_rate": "0.7"})
    files = [
        saved(tmp_path, source.state_dict()),
        tmp_path / "model.safetensors",
        saved(tmp_path, {"model": source.state_dict(), "epoch": np.int64(4)}, "nested.pt"),
    ]
    for file in files:
        load_checkpoint(model := evit(), file)
        assert torch.equal(model(images()), source(images()))
        plain = vit()
        load_checkpoint(plain, file)
        assert torch.equal(evit_ext.apply(plain, keep_rate=0.7)(images()), source(images()))
        applied = evit_ext.apply(vit(), keep_rate=0.7)
        load_checkpoint(applied, file)
        assert torch.equal(applied(images()), source(images()))


def test_other_models_of_timm(tmp_path: Path) -> None:
    for name, arguments in (
        ("resnet18", {"num_classes": 5}),
        ("convnext_atto", {"num_classes": 5}),
        ("beit_base_patch16_224", {**MICRO, "num_classes": 5}),
        ("eva02_tiny_patch14_224", {**MICRO, "num_classes": 5, "depth": 2}),
    ):
        source, model = (timm.create_model(name, **arguments) for _ in range(2))
        loaded = load_checkpoint(model, saved(tmp_path, source.state_dict()))
        assert_loaded(model, source.state_dict())
        assert loaded.unexpected_keys == ()
        other = timm.create_model(name, **{**arguments, "num_classes": 3})
        loaded = load_checkpoint(other, tmp_path / "checkpoint.pth", resize_head=True)
        assert loaded.head_keys and all("head" in key or "fc" in key for key in loaded.head_keys)
        assert_loaded(other, source.state_dict(), *loaded.head_keys)


def test_kernels_and_tables_are_resized_by_timm_on_request(tmp_path: Path) -> None:
    source = timm.create_model("beit_base_patch16_224", **MICRO, num_classes=5)
    file = saved(tmp_path, source.state_dict())
    larger = timm.create_model("beit_base_patch16_224", **{**MICRO, "img_size": 48}, num_classes=5)
    assert "resize_pos_embed=True has timm resize it" in refused(larger, file)
    loaded = load_checkpoint(larger, file, resize_pos_embed=True)
    assert all("relative_position_bias_table" in key for key in loaded.resized_keys)
    assert len(loaded.resized_keys) == 4
    finer = vit(patch_size=4, img_size=16)
    said = refused(finer, saved(tmp_path, deit_file()))
    assert "patch_embed.proj.weight has shape 24×3×8×8, the model's 24×3×4×4" in said
    loaded = load_checkpoint(finer, tmp_path / "checkpoint.pth", resize_pos_embed=True)
    assert loaded.resized_keys == ("patch_embed.proj.weight",)


# --- where the weights are


def test_prefixes(tmp_path: Path) -> None:
    state = deit_file()
    for prefix in ("module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model.", "backbone."):
        file = saved(tmp_path, {f"{prefix}{key}": value for key, value in state.items()})
        load_checkpoint(model := evit(), file)
        assert_loaded(model, state)
    # Only where every key has it, and the model has not.
    file = saved(tmp_path, {f"module.{k}": v for k, v in state.items()} | {"other": torch.ones(1)})
    assert "none of the weights' 57 keys is one of DeiT's 56" in refused(evit(), file)
    own = nn.ModuleDict({"backbone": evit()})
    file = saved(tmp_path, own.state_dict())
    assert len(load_checkpoint(nn.ModuleDict({"backbone": evit()}), file).loaded_keys) == len(state)


def test_wrapped_models(tmp_path: Path) -> None:
    state = deit_file()
    file = saved(tmp_path, {"model": state})
    inner = evit()
    for model in (torch.compile(inner), nn.DataParallel(inner), torch.compile(nn.DataParallel(inner))):
        nn.init.zeros_(inner.head.weight)
        load_checkpoint(model, file)
        assert_loaded(inner, state)


def test_moving_averages(tmp_path: Path) -> None:
    state = deit_file()
    only = saved(tmp_path, {"model_ema": state, "model": None})
    assert load_checkpoint(evit(), only).is_ema
    assert "has a moving average of the weights only, under 'model_ema'" in refused(
        evit(), only, use_ema=False
    )
    plain = saved(tmp_path, {"model": state, "model_ema": None})
    assert not load_checkpoint(evit(), plain).is_ema
    assert "has no moving average of the weights, which use_ema=True asks for" in refused(
        evit(), plain, use_ema=True
    )
    deep = saved(tmp_path, {"model": {"state_dict": state}})
    assert load_checkpoint(evit(), deep).entry == "model.state_dict"


def test_files_without_weights(tmp_path: Path) -> None:
    said = refused(evit(), saved(tmp_path, {"teacher": deit_file(), "student": deit_file(), "epoch": 3}))
    assert "found no weights in" in said and "it has 'teacher', 'student', 'epoch'" in said
    assert "it has nothing" in refused(evit(), saved(tmp_path, {}))
    assert "holds a list, expected a dict of weights" in refused(evit(), saved(tmp_path, [1, 2]))
    assert "holds a Tensor" in refused(evit(), saved(tmp_path, torch.ones(2)))
