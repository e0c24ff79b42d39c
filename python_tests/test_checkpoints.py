"""load_checkpoint: files as the publications wrote them, files that lie, and files that do not fit."""

from __future__ import annotations

import argparse
import functools
import hashlib
import http.server
import io
import os
import pickle
import shutil
import threading
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from slow_evit import slow_bicubic
from timm.layers import resample_abs_pos_embed
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import evit_ext
from evit_ext import models
from evit_ext.checkpoints import LoadedCheckpoint, load_checkpoint
from evit_ext.training import Recipe, Trainer

pytestmark = pytest.mark.usefixtures("one_thread")

MICRO: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 2}


# --- models, and files with the layouts that were published


def evit(**arguments: Any) -> Any:
    return models.deit_tiny(**{**MICRO, "drop_loc": None, "num_classes": 5, **arguments}).eval()


def lvvit(**arguments: Any) -> Any:
    arguments = {"stem_dim": 6, "skip_lam": 2.0, "num_classes": 5, **MICRO, **arguments}
    return models.lvvit_small(**arguments).eval()


def dynamicvit(**arguments: Any) -> Any:
    return models.dynamicvit_tiny(**{**MICRO, "drop_loc": None, "num_classes": 5, **arguments}).eval()


def vit(cls: type = VisionTransformer, **arguments: Any) -> Any:
    return cls(**{**MICRO, "num_classes": 5, **arguments}).eval()


def images(height: int = 32, width: int = 32) -> Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0))


def linear(name: str, out: int, inputs: int, bias: bool = True) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": (out, inputs)}
    return {**shapes, f"{name}.bias": (out,)} if bias else shapes


def norm(name: str, channels: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (channels,), f"{name}.bias": (channels,)}


def blocks(depth: int = 4, c: int = 24, mlp: int = 96, qkv_bias: bool = True) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for i in range(depth):
        shapes |= norm(f"blocks.{i}.norm1", c) | linear(f"blocks.{i}.attn.qkv", 3 * c, c, qkv_bias)
        shapes |= linear(f"blocks.{i}.attn.proj", c, c) | norm(f"blocks.{i}.norm2", c)
        shapes |= linear(f"blocks.{i}.mlp.fc1", mlp, c) | linear(f"blocks.{i}.mlp.fc2", c, mlp)
    return shapes


def draw(shapes: dict[str, tuple[int, ...]], seed: int = 7) -> OrderedDict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return OrderedDict(
        (key, torch.randn(shape, generator=generator) * 0.3 if shape else torch.tensor(100))
        for key, shape in shapes.items()
    )


def deit_file(classes: int = 5, tokens: int = 17, channels: int = 3, **options: Any) -> dict[str, Tensor]:
    """Weights under the names that DeiT's and EViT's published files have, those of timm 0.4.12."""
    c = options.get("c", 24)
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, c),
        "pos_embed": (1, tokens, c),
        "patch_embed.proj.weight": (c, channels, 8, 8),
        "patch_embed.proj.bias": (c,),
    }
    return draw(shapes | blocks(**options) | norm("norm", c) | linear("head", classes, c))


def distilled_file(classes: int = 5) -> dict[str, Tensor]:
    added = draw({"dist_token": (1, 1, 24), **linear("head_dist", classes, 24)}, seed=8)
    return {**deit_file(classes, tokens=18), **added}


def lvvit_file(classes: int = 5, tokens: int = 17) -> dict[str, Tensor]:
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, 24),
        "pos_embed": (1, tokens, 24),
        "patch_embed.proj.weight": (24, 6, 4, 4),
        "patch_embed.proj.bias": (24,),
    }
    for i, kernel in ((1, (6, 3, 7, 7)), (2, (6, 6, 3, 3)), (3, (6, 6, 3, 3))):
        shapes[f"patch_embed.conv{i}.weight"] = kernel
        shapes |= {f"patch_embed.bn{i}.{k}": (6,) for k in ("weight", "bias", "running_mean", "running_var")}
        shapes[f"patch_embed.bn{i}.num_batches_tracked"] = ()
    shapes |= blocks(mlp=72, qkv_bias=False) | norm("norm", 24)
    return draw(shapes | linear("head", classes, 24) | linear("aux_head", classes, 24))


def dynamicvit_file() -> dict[str, Tensor]:
    shapes: dict[str, tuple[int, ...]] = {}
    for i in range(3):
        name = f"score_predictor.{i}"
        shapes |= norm(f"{name}.in_conv.0", 24) | linear(f"{name}.in_conv.1", 24, 24)
        for number, out, inputs in ((0, 12, 24), (2, 6, 12), (4, 2, 6)):
            shapes |= linear(f"{name}.out_conv.{number}", out, inputs)
    return {**deit_file(), **draw(shapes, seed=9)}


def evit_arguments() -> argparse.Namespace:
    """Some of what the published EViT's main.py saves as "args"."""
    return argparse.Namespace(
        model="deit_small_patch16_shrink_base",
        base_keep_rate=0.7,
        drop_loc="(3, 6, 9)",
        fuse_token=True,
        opt_betas=None,
        lr_noise=[0.1, 0.9],
    )


def training_file() -> dict[str, Any]:
    """What DeiT's and EViT's training code saves each epoch."""
    state = deit_file()
    parameter = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter])
    parameter.sum().backward()
    optimizer.step()
    return {
        "model": state,
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": {"base_values": [np.float64(5e-4)], "t_in_epochs": True},
        "epoch": 29,
        "model_ema": {key: value + 1 for key, value in state.items()},
        "scaler": {"scale": 65536.0, "growth_factor": 2.0, "_growth_tracker": 0},
        "args": evit_arguments(),
        "max_accuracy": np.float64(79.5),
        "confusion": np.arange(6).reshape(2, 3),
        "output_dir": Path("runs"),
    }


def saved(folder: Path, content: Any, name: str = "checkpoint.pth", **options: Any) -> Path:
    torch.save(content, folder / name, **options)
    return folder / name


def assert_loaded(model: nn.Module, state: dict[str, Tensor], *others: str) -> None:
    """Check that `model` has exactly the weights of `state`, but for keys that begin with `others`."""
    own = model.state_dict()
    assert {k for k in own if not k.startswith(others)} == {k for k in state if not k.startswith(others)}
    for key, value in own.items():
        if not key.startswith(others):
            assert torch.equal(value, state[key].to(value)), key


def refused(model: nn.Module, file: Any, error: type[Exception] = ValueError, **options: Any) -> str:
    """Load what must be refused; check that nothing in the model has changed, return what was said."""
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(error) as caught:
        load_checkpoint(model, file, progress=False, **options)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    return str(caught.value)


# --- the publications


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


# --- files that lie, or are damaged


class Harmful:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


class Calls:
    """Calls a function when it is unpickled."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("zip_format", [True, False])
@pytest.mark.parametrize("place", ["args", "model", "numpy"])
def test_nothing_in_a_file_is_executed(tmp_path: Path, zip_format: bool, place: str) -> None:
    marker = tmp_path / "executed"
    harmful = Harmful(f"touch {marker}")
    content: dict[str, Any] = {"model": deit_file()}
    if place == "args":
        content["args"] = argparse.Namespace(model=harmful)
    elif place == "model":
        content["model"]["head.bias"] = harmful
    else:
        content["epoch"] = Calls(functools.partial, os.system, f"touch {marker}")
    file = saved(tmp_path, content, _use_new_zipfile_serialization=zip_format)
    said = refused(evit(), file)
    assert not marker.exists()
    assert "nothing was executed" in said and "torch.load(path, weights_only=False)" in said
    name = "functools.partial" if place == "numpy" else f"{os.system.__module__}.system"
    assert f"holds more than weights: {name}" in said
    # The file would have done it.
    torch.load(file, weights_only=False)
    assert marker.exists() == (place != "numpy")


def test_numpys_own_code_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NumPy's unpickling takes sizes and addresses from the file: it is skipped, not trusted."""
    file = saved(tmp_path, training_file())
    calls = []
    multiarray = np.ones(1).__reduce__()[0].__module__
    monkeypatch.setattr(f"{multiarray}._reconstruct", lambda *a: calls.append(a))
    monkeypatch.setattr(f"{multiarray}.scalar", lambda *a: calls.append(a))
    load_checkpoint(evit(), file)
    assert not calls


def test_a_whole_model_is_refused(tmp_path: Path) -> None:
    said = refused(evit(), saved(tmp_path, vit()))
    assert "timm.models.vision_transformer.VisionTransformer" in said


def test_what_is_allowed_is_allowed_here_only(tmp_path: Path) -> None:
    file = saved(tmp_path, training_file())
    load_checkpoint(evit(), file)
    assert argparse.Namespace not in torch.serialization.get_safe_globals()
    with pytest.raises(pickle.UnpicklingError):
        torch.load(file, weights_only=True)
    # What somebody has allowed stays allowed.
    with torch.serialization.safe_globals([argparse.Namespace]):
        load_checkpoint(evit(), file)
        assert argparse.Namespace in torch.serialization.get_safe_globals()


def npz(path: Path) -> None:
    np.savez(path.open("wb"), a=np.ones(3))


def zip_of_text(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")


def torchscript(path: Path) -> None:
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), path)


def truncated(path: Path) -> None:
    torch.save(deit_file(), path)
    path.write_bytes(path.read_bytes()[:-5000])


def truncated_legacy(path: Path) -> None:
    torch.save(deit_file(), path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:-5000])


def truncated_safetensors(path: Path) -> None:
    save_file(deit_file(), path)
    path.write_bytes(path.read_bytes()[:-5000])


BAD_FILES: dict[str, tuple[Any, str]] = {
    "empty": (b"", "is empty"),
    "html": (b"\n<!DOCTYPE html><html>Sign in</html>", "is a web page, not a checkpoint"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a", "is a Git LFS pointer"),
    "text": (b"hello, world", "is no checkpoint, it begins with b'hello, world'"),
    "json": (b'{"model_type": "vit"}', "is a JSON file"),
    "gzip": (b"\x1f\x8b\x08\x00", "is compressed by gzip"),
    "npy": (b"\x93NUMPY\x01\x00", "is a NumPy array"),
    "npz": (npz, "is a NumPy archive, as JAX's vision transformers are published in: timm"),
    "zip": (zip_of_text, "is a zip archive that torch.save did not write"),
    "torchscript": (torchscript, "is a TorchScript archive"),
    "pickle": (pickle.dumps({"a": 1}), "is damaged, or no checkpoint"),
    "truncated": (truncated, "is not complete, or damaged: it has"),
    "truncated legacy": (truncated_legacy, "is damaged, or no checkpoint"),
    "truncated safetensors": (truncated_safetensors, "is not complete, or damaged"),
    "safetensors header": ((40).to_bytes(8, "little") + b"{not json", "is not complete, or damaged"),
}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:Detected pickle protocol")
@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_files(tmp_path: Path, kind: str) -> None:
    content, message = BAD_FILES[kind]
    file = tmp_path / "checkpoint.pth"
    if callable(content):
        content(file)
    else:
        file.write_bytes(content)
    assert refused(evit(), file).startswith(f"{file} {message}")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_every_truncation_and_flipped_byte_gives_a_clear_error(tmp_path: Path) -> None:
    """Whatever is damaged, it is a ValueError or goes unnoticed; nothing else comes out."""
    rng = np.random.default_rng(0)
    model = nn.Linear(3, 2)
    for new_format in (True, False):
        whole = saved(tmp_path, {"model": model.state_dict()}, _use_new_zipfile_serialization=new_format)
        content = whole.read_bytes()
        damaged = tmp_path / "damaged.pth"
        for _ in range(150):
            data = bytearray(content[: rng.integers(1, len(content) + 1)])
            data[rng.integers(len(data))] ^= 1 << rng.integers(8)
            damaged.write_bytes(data)
            try:
                load_checkpoint(model, damaged)
            except ValueError:
                continue


def test_missing_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert f"there is no file no-such.pth in {tmp_path}" in refused(
        evit(), "no-such.pth", error=FileNotFoundError
    )
    (tmp_path / "model.safetensors").touch()
    said = refused(evit(), tmp_path, error=IsADirectoryError)
    assert said == f"{tmp_path} is a folder: give the file in it; in it: model.safetensors"


@pytest.mark.parametrize("source", ["ftp://example.org/a.pth", "s3://bucket/a.pth", "file:///a.pth"])
def test_other_schemes(source: str) -> None:
    assert f"must be a path, an http(s) URL or hf-hub:owner/name, got {source!r}" in refused(evit(), source)


def test_arguments_of_other_types(tmp_path: Path) -> None:
    file = saved(tmp_path, deit_file())
    for options, message in (
        ({"strict": 1}, "strict must be True or False, got 1"),
        ({"resize_head": None}, "resize_head must be True or False, got None"),
        ({"use_ema": "yes"}, "use_ema must be True, False or None, got 'yes'"),
        ({"resize_pos_embed": 7}, "or the grid that the weights are for, (height, width), got 7"),
        ({"resize_pos_embed": (7, 7, 1)}, "(height, width), got (7, 7, 1)"),
        ({"resize_pos_embed": (7, 7.0)}, "(height, width), got (7, 7.0)"),
    ):
        assert message in refused(evit(), file, TypeError, **options)
    assert "(height, width), got (0, 16)" in refused(evit(), file, resize_pos_embed=(0, 16))
    assert "path_or_url must be a path or a URL, got int" in refused(evit(), 3, TypeError)
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got dict"):
        load_checkpoint({}, file)  # type: ignore[arg-type]


# --- from the network


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    return tmp_path / "hub" / "checkpoints"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Any]:
    """A web server: a function from a path below its folder to a URL, with that folder and the requests."""
    folder = tmp_path / "served"
    folder.mkdir()
    requests: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args, directory=str(folder))

        def log_message(self, format: str, *args: Any) -> None:
            requests.append(self.path)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()

        def url(name: str) -> str:
            return f"http://127.0.0.1:{running.server_port}/{name}"

        url.folder, url.requests = folder, requests  # type: ignore[attr-defined]
        yield url
        running.shutdown()
        thread.join()


def test_url(server: Any, cache: Path) -> None:
    state = deit_file()
    saved(server.folder, {"model": state})
    for _ in range(2):
        loaded = load_checkpoint(model := evit(), server("checkpoint.pth"), progress=False)
        assert_loaded(model, state)
        assert loaded.source == server("checkpoint.pth")
    assert server.requests == ["/checkpoint.pth"]  # the second time, from the cache


def test_two_urls_with_the_same_name(server: Any, cache: Path) -> None:
    for folder, seed in (("a", 1), ("b", 2)):
        (server.folder / folder).mkdir()
        saved(server.folder / folder, {"head.bias": draw({"x": (5,)}, seed)["x"]})
    model = evit()
    biases = []
    for folder in ("a", "b"):
        load_checkpoint(model, server(f"{folder}/checkpoint.pth"), strict=False, progress=False)
        biases.append(model.head.bias.detach().clone())
    assert not torch.equal(*biases)


def test_hash_in_the_name(server: Any, cache: Path) -> None:
    file = saved(server.folder, deit_file())
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    right, wrong = f"deit-{digest[:8]}.pth", "deit-0123456a.pth"
    shutil.copy(file, server.folder / right)
    shutil.copy(file, server.folder / wrong)
    load_checkpoint(evit(), server(right), progress=False)
    assert (cache / right).exists()  # where torch and timm would look for it
    said = refused(evit(), server(wrong))
    assert "its SHA-256 does not begin with 0123456a" in said
    # "-83.3" is no hash, nor is a date.
    for name in ("lvvit_s-26M-224-83.3.pth.tar", "deit-20210101.pth"):
        shutil.copy(file, server.folder / name)
        load_checkpoint(evit(), server(name), progress=False)
    assert not list(cache.rglob("*.partial"))
    assert not list(cache.rglob(wrong))


def test_urls_that_give_no_checkpoint(server: Any, cache: Path) -> None:
    (server.folder / "view.pth").write_bytes(b"<html>Sign in</html>")
    assert f"{server('view.pth')} is a web page" in refused(evit(), server("view.pth"))
    truncated_safetensors(server.folder / "short.safetensors")
    assert "is not complete, or damaged" in refused(evit(), server("short.safetensors"))
    said = refused(evit(), server("none.pth"), RuntimeError)
    assert said == f"{server('none.pth')} could not be fetched: the server answered 404 File not found"
    assert not [path for path in cache.rglob("*") if path.is_file()]
    # Not stuck: once the right file is there, it is fetched.
    shutil.copy(saved(server.folder, deit_file()), server.folder / "view.pth")
    load_checkpoint(evit(), server("view.pth"), progress=False)


def test_offline(cache: Path) -> None:
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as closed:
        url = f"http://127.0.0.1:{closed.server_port}/checkpoint.pth"
    said = refused(evit(), url, RuntimeError)
    assert f"{url} could not be fetched, nor is it in torch's cache (URLError: " in said
    assert said.endswith("Without a network, bring the file here another way and give its path")


def test_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The safetensors file is preferred; what is in the cache is found when the hub is not reached."""
    errors = pytest.importorskip("huggingface_hub.errors")
    state = deit_file()
    file = saved(tmp_path, state)
    save_file(state, tmp_path / "model.safetensors")
    asked: list[Any] = []
    there: dict[str, Any] = {}

    def download(repository: str, name: str, revision: Any = None, local_files_only: bool = False) -> str:
        asked.append((repository, name, revision, local_files_only))
        found = there.get(name, errors.EntryNotFoundError("404"))
        if isinstance(found, Exception):
            raise found
        return str(found)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    there["pytorch_model.bin"] = file
    load_checkpoint(model := evit(), "hf-hub:someone/evit@v2")
    assert_loaded(model, state)
    assert asked == [
        ("someone/evit", "model.safetensors", "v2", False),
        ("someone/evit", "pytorch_model.bin", "v2", False),
    ]
    there["model.safetensors"] = errors.LocalEntryNotFoundError("offline")
    load_checkpoint(evit(), "hf_hub:someone/evit")
    assert asked[-1] == ("someone/evit", "pytorch_model.bin", None, True)
    there["pytorch_model.bin"] = errors.LocalEntryNotFoundError("offline")
    said = refused(evit(), "hf-hub:someone/evit", RuntimeError)
    assert "could not be fetched from the Hugging Face hub, nor is it in its cache" in said
    there.clear()
    said = refused(evit(), "hf-hub:someone/evit", RuntimeError)
    assert "has no model.safetensors and no pytorch_model.bin" in said
    assert "hf-hub:owner/name@revision, got 'hf-hub:evit'" in refused(evit(), "hf-hub:evit")


@pytest.mark.parametrize("name", ["deit_tiny", "dynamicvit_tiny", "lvvit_small"])
def test_pretrained_offline_names_the_way_out(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise ConnectionError("refused")

    for module in ("deit", "lvvit"):
        monkeypatch.setattr(f"evit_ext.models.{module}.build_model_with_cfg", fail)
    with pytest.raises(RuntimeError, match="pretrained=False and load a file with evit_ext.load_ch"):
        getattr(models, name)(pretrained=True)


# --- what does not fit


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
        "  - of another shape or type: norm.bias torch.int8 (torch.strided), not torch.float32, "
        "norm.weight 25, not 24",
        "  - not in the model: blocks.0.extra",
    ]
    said = refused(evit(), file, strict=False, resize_head=True, resize_pos_embed=True)
    assert said.split("\n")[1:] == [
        "  - of another shape or type: norm.bias torch.int8 (torch.strided), not torch.float32, "
        "norm.weight 25, not 24"
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
    monkeypatch.setattr(
        "evit_ext.checkpoints.fitting.resample_abs_pos_embed", lambda embedding, **_: embedding
    )
    load_checkpoint(model, file, resize_pos_embed=(2, 8))
    assert not torch.allclose(model.pos_embed, source.pos_embed)
    same = build(img_size=(16, 64))
    assert load_checkpoint(same, file, resize_pos_embed=(2, 8)).resized_keys == ()
    assert torch.equal(same.pos_embed, source.pos_embed)


def test_a_grid_for_a_model_without_one(tmp_path: Path) -> None:
    file = saved(tmp_path, timm.create_model("resnet18").state_dict())
    said = refused(timm.create_model("resnet18"), file, resize_pos_embed=(2, 8))
    assert "is for timm's VisionTransformer with a position embedding, not for ResNet" in said


# --- the model's side


def test_dtype_and_identity_of_parameters(tmp_path: Path, device: torch.device) -> None:
    model = evit().to(device, torch.bfloat16)
    before = dict(model.named_parameters())
    load_checkpoint(model, saved(tmp_path, {"model": deit_file()}))
    assert_loaded(model, deit_file())
    for name, parameter in model.named_parameters():
        assert parameter is before[name] and parameter.requires_grad
        assert (parameter.dtype, parameter.device.type) == (torch.bfloat16, device.type)


def test_half_precision_files(tmp_path: Path) -> None:
    half = {key: value.half() for key, value in deit_file(tokens=26).items()}
    model = evit()
    load_checkpoint(model, saved(tmp_path, half), resize_pos_embed=True)
    assert model.pos_embed.dtype == torch.float32 and torch.isfinite(model(images())).all()


def test_models_that_cannot_take_weights(tmp_path: Path) -> None:
    file = saved(tmp_path, deit_file())
    with torch.device("meta"):
        model = vit()
    with pytest.raises(ValueError, match="cls_token is on the meta device, which holds no weights"):
        load_checkpoint(model, file)

    class Shard(Tensor):
        pass

    model = vit()
    model.norm.weight = nn.Parameter(torch.ones(24).as_subclass(Shard))
    with pytest.raises(ValueError, match="norm.weight is a Shard, no plain tensor: load the check"):
        load_checkpoint(model, file)


def test_the_file_can_go_away_afterwards(tmp_path: Path) -> None:
    """The file is mapped while it is read; the model must not be."""
    model, state = evit(), deit_file()
    file = saved(tmp_path, {"model": state})
    load_checkpoint(model, file)
    file.write_bytes(b"\0" * file.stat().st_size)
    assert_loaded(model, state)


def test_checkpoint_path_goes_on_working(tmp_path: Path) -> None:
    state = lvvit_file()
    assert_loaded(lvvit(checkpoint_path=saved(tmp_path, {"state_dict": state})), state)
    state = deit_file()
    assert_loaded(evit(checkpoint_path=saved(tmp_path, {"model": state})), state)


def test_in_memory_files_are_no_paths() -> None:
    assert "got BytesIO" in refused(evit(), io.BytesIO(b""), TypeError)


def test_dicts_in_themselves_and_in_many_places(tmp_path: Path) -> None:
    """A small file must not keep anyone busy for long."""
    itself: dict[str, Any] = {"epoch": 3}
    itself["model"] = itself
    refused(evit(), saved(tmp_path, itself))
    itself["weight"] = torch.zeros(1)
    assert "more than 8 deep" in refused(evit(), saved(tmp_path, itself))
    wide: dict[str, Any] = {"nothing": 1}
    for _ in range(60):
        wide = {"model": wide, "state_dict": wide}
    assert "found no weights" in refused(evit(), saved(tmp_path, wide))


def test_many_threads(tmp_path: Path) -> None:
    file = saved(tmp_path, training_file())
    before = torch.serialization.get_safe_globals()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: load_checkpoint(evit(), file), range(24)))
    assert torch.serialization.get_safe_globals() == before


def test_parameters_made_in_inference_mode(tmp_path: Path) -> None:
    model = evit()
    with torch.inference_mode():
        model.norm.weight = nn.Parameter(torch.ones(24))
    expected = model.cls_token.clone()
    assert "was made in inference mode" in refused(model, saved(tmp_path, deit_file()))
    assert torch.equal(model.cls_token, expected)
