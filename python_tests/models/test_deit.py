"""The DeiT models: their names, timm's arguments, keys, and images and weights of other sizes."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import timm.data
import torch
from PIL import Image
from slow_evit import slow_bicubic, slow_evit
from timm.models.vision_transformer import VisionTransformer

import evit_ext
from evit_ext import models
from evit_ext.models.deit import DeiT
from evit_ext.patching.block import ReorganizingBlock

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = ("tiny", "small", "base")
MICRO: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 2}


def stages(model: Any) -> list[int]:
    return [i for i, block in enumerate(model.blocks) if isinstance(block, ReorganizingBlock)]


def micro(**arguments: Any) -> DeiT:
    return models.deit_tiny(**{**MICRO, "drop_loc": None, "num_classes": 5, **arguments}).eval()


def images(height: int = 32, width: int = 32, **options: Any) -> torch.Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0), **options)


# --- names and arguments


@pytest.mark.parametrize("size", SIZES)
def test_state_dict_is_that_of_timm(size: str) -> None:
    ours = getattr(models, f"deit_{size}")(weight_init="skip").state_dict()
    timms = timm.create_model(f"deit_{size}_patch16_224", weight_init="skip").state_dict()
    assert [(key, value.shape) for key, value in ours.items()] == [(k, v.shape) for k, v in timms.items()]


def test_weights_go_both_ways() -> None:
    arguments = {**MICRO, "num_classes": 5}
    ours = models.deit_small(keep_rate=1.0, drop_loc=None, **arguments).eval()
    plain = timm.create_model("deit_small_patch16_224", **arguments).eval()
    ours.load_state_dict(plain.state_dict())
    assert torch.equal(ours(images()), plain(images()))
    torch.nn.init.normal_(ours.head.weight)
    plain.load_state_dict(ours.state_dict())
    assert torch.equal(ours(images()), plain(images()))


@pytest.mark.parametrize("size", SIZES)
def test_registry_gives_the_same_model(size: str) -> None:
    name = f"evit_deit_{size}_patch16_224"
    assert timm.is_model(name)
    arguments = {**MICRO, "num_classes": 3, "keep_rate": 0.4, "fuse_token": False, "drop_loc": (0, 2)}
    torch.manual_seed(1)
    ours = getattr(models, f"deit_{size}")(**arguments).eval()
    torch.manual_seed(1)
    registered = timm.create_model(name, **arguments).eval()
    assert isinstance(registered, DeiT)
    assert torch.equal(ours(images()), registered(images()))
    assert [block.keep_rate for block in registered.blocks if isinstance(block, ReorganizingBlock)] == [
        0.4,
        0.4,
    ]


def test_defaults_are_the_papers() -> None:
    tiny, small, base = (getattr(models, f"deit_{size}")(weight_init="skip") for size in SIZES)
    registered = timm.create_model("evit_deit_small_patch16_224", weight_init="skip")
    for model in (small, registered):
        assert stages(model) == [3, 6, 9]
        block = model.blocks[3]
        assert (block.keep_rate, block.rule.fuse_token, block.num_prefix_tokens) == (0.7, True, 1)
        assert (model.num_classes, model.patch_embed.img_size) == (1000, (224, 224))
        assert (len(model.blocks), model.embed_dim, model.blocks[0].attn.num_heads) == (12, 384, 6)
    assert (tiny.embed_dim, tiny.blocks[0].attn.num_heads) == (192, 3)
    assert (base.embed_dim, base.blocks[0].attn.num_heads) == (768, 12)


def test_timm_arguments_pass_through(tmp_path: Path) -> None:
    assert micro(num_classes=0)(images()).shape == (2, 24)
    assert micro(in_chans=1)(images()[:, :1]).shape == (2, 5)
    assert micro(drop_path_rate=0.3).blocks[3].drop_path1.drop_prob == pytest.approx(0.3)
    assert micro(depth=8, drop_loc=None).blocks[2].keep_rate == 0.7
    assert stages(micro(depth=8, drop_loc=(1,))) == [1]
    assert micro(reg_tokens=2).blocks[1].num_prefix_tokens == 3
    assert micro(global_pool="avg", no_embed_class=True)(images()).shape == (2, 5)
    model = micro()
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    assert torch.equal(micro(checkpoint_path=tmp_path / "weights.pth")(images()), model(images()))
    with pytest.raises(TypeError, match="no_such_argument"):
        micro(no_such_argument=1)
    with pytest.raises(ValueError, match=r"keep_rate must be in \(0, 1\], got 2"):
        micro(keep_rate=2)


@pytest.mark.parametrize("size", SIZES)
def test_pretrained_configuration_is_that_of_timm(size: str) -> None:
    ours = timm.get_pretrained_cfg(f"evit_deit_{size}_patch16_224").to_dict()
    timms = timm.get_pretrained_cfg(f"deit_{size}_patch16_224").to_dict()
    assert timms["hf_hub_id"] == f"timm/deit_{size}_patch16_224.fb_in1k"
    assert {key: value for key, value in ours.items() if key != "architecture"} == {
        key: value for key, value in timms.items() if key != "architecture"
    }


@pytest.mark.parametrize("img_size", [256, 272, 288, 304])
def test_larger_images_at_equal_cost(tmp_path: Path, img_size: int) -> None:
    """Their weights are DeiT-S's, with the embedding resized; timm's transforms make images of their size."""
    name = f"evit_deit_small_patch16_{img_size}"
    cfg = timm.get_pretrained_cfg(name)
    assert cfg.hf_hub_id == "timm/deit_small_patch16_224.fb_in1k"
    assert cfg.input_size == (3, img_size, img_size)
    source = timm.create_model("deit_small_patch16_224", depth=1)
    torch.save({"model": source.state_dict()}, tmp_path / "weights.pth")
    overlay = {"file": str(tmp_path / "weights.pth")}
    model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, depth=1, drop_loc=[0])
    config = timm.data.resolve_model_data_config(model)
    assert config["input_size"] == (3, img_size, img_size)
    picture = Image.new("RGB", (500, 400))
    transformed = timm.data.create_transform(**config)(picture)
    assert model.eval()(transformed.unsqueeze(0)).shape == (1, 1000)
    side = img_size // 16
    embedding = source.pos_embed.detach().double()
    expected = slow_bicubic(embedding[0, 1:], side, side)
    torch.testing.assert_close(model.pos_embed[0, 1:].double(), expected, rtol=1e-5, atol=1e-7)
    assert torch.equal(model.pos_embed[:, :1], source.pos_embed[:, :1])
    assert torch.equal(model.head.weight, source.head.weight)


@pytest.mark.parametrize("nesting", ["model", "state_dict"])
def test_pretrained_from_a_file(tmp_path: Path, nesting: str) -> None:
    """The path that the hub's weights take, with a published file's nesting, at another image size."""
    source = timm.create_model("deit_tiny_patch16_224", **{**MICRO, "img_size": 64, "num_classes": 1000})
    torch.save({nesting: source.state_dict()}, tmp_path / "weights.pth")
    model = timm.create_model(
        "evit_deit_tiny_patch16_224",
        pretrained=True,
        pretrained_cfg_overlay={"file": str(tmp_path / "weights.pth")},
        **{**MICRO, "num_classes": 5},
    )
    assert torch.equal(model.blocks[1].mlp.fc1.weight, source.blocks[1].mlp.fc1.weight)
    embedding = source.pos_embed.detach().double()
    torch.testing.assert_close(
        model.pos_embed[0, 1:].double(), slow_bicubic(embedding[0, 1:], 4, 4), rtol=1e-5, atol=1e-7
    )
    assert model.head.weight.shape == (5, 24)


@pytest.mark.parametrize("error", [OSError("no route"), ConnectionError("refused")])
def test_pretrained_without_a_network(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise error

    monkeypatch.setattr("evit_ext.models.deit.build_model_with_cfg", fail)
    with pytest.raises(RuntimeError, match="weights of deit_tiny_patch16_224 could not be fetched"):
        models.deit_tiny(pretrained=True)


def test_import_registers_the_names_from_anywhere(tmp_path: Path) -> None:
    code = (
        "import evit_ext, timm; evit_ext.models.deit_tiny(depth=1, drop_loc=[0]); "
        "print(*timm.list_models('evit_*'), evit_ext.__version__)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    for size in SIZES:
        assert f"evit_deit_{size}_patch16_224" in run.stdout


# --- images and weights of other sizes


def resized(model: DeiT, height: int, width: int) -> VisionTransformer:
    """Return a plain timm model for another image size, its embedding resized by the oracle."""
    arguments = {**MICRO, "img_size": (height, width), "num_classes": 5}
    plain = VisionTransformer(**arguments).to(model.pos_embed).eval()
    state = evit_ext.remove(model).state_dict()
    patches = slow_bicubic(state["pos_embed"][0, 1:], height // 8, width // 8)
    state["pos_embed"] = torch.cat([state["pos_embed"][0, :1], patches]).unsqueeze(0)
    plain.load_state_dict(state)
    return plain


def big_weights(model: DeiT) -> DeiT:
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize(("height", "width"), [(48, 48), (24, 24), (32, 56), (40, 16), (32, 32)])
def test_images_of_any_size(height: int, width: int, device: torch.device) -> None:
    model = big_weights(micro(keep_rate=0.6).double()).to(device)
    x = images(height, width, dtype=torch.float64).to(device)
    with evit_ext.record_tokens(model) as record:
        logits = model(x)
    expected, kept, _ = slow_evit(resized(model, height, width), x, (0.6, 0.6, 0.6), (1, 2, 3))
    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-12)
    for a, b in zip(record.kept, kept, strict=True):
        assert torch.equal(a.sort(dim=1).values, b.sort(dim=1).values)


def test_gradient_of_a_resized_position_embedding(device: torch.device) -> None:
    model = micro(keep_rate=0.6).to(device)
    model(images(48, 48).to(device)).sum().backward()
    assert model.pos_embed.grad.shape == (1, 17, 24)
    assert (model.pos_embed.grad.abs().sum(dim=-1) > 0).all()


def test_weights_of_another_size(caplog: pytest.LogCaptureFixture) -> None:
    model = big_weights(micro(keep_rate=0.6).double())
    larger = micro(keep_rate=0.6, img_size=48).double()
    state = model.state_dict()
    before = {key: value.clone() for key, value in state.items()}
    with caplog.at_level(logging.INFO, logger="evit_ext"):
        larger.load_state_dict(state)
    assert [record.message for record in caplog.records] == [
        "Resizing the position embedding from (4, 4) to (6, 6) patches."
    ]
    assert all(torch.equal(state[key], before[key]) for key in before)
    x = images(48, 48, dtype=torch.float64)
    expected, _, _ = slow_evit(resized(model, 48, 48), x, (0.6, 0.6, 0.6), (1, 2, 3))
    torch.testing.assert_close(larger(x), expected, rtol=1e-10, atol=1e-12)
    # As a part of a larger model, too.
    torch.nn.Sequential(micro(img_size=48).double()).load_state_dict({f"0.{k}": v for k, v in state.items()})


def test_weights_that_do_not_fit() -> None:
    state = micro(img_size=(32, 48)).state_dict()
    with pytest.raises(RuntimeError, match="size mismatch for pos_embed"):
        micro().load_state_dict(state)


def test_set_input_size(device: torch.device) -> None:
    model = big_weights(micro(keep_rate=0.6).double()).to(device)
    x = images(40, 56, dtype=torch.float64).to(device)
    expected = model(x)
    model.set_input_size(img_size=(40, 56))
    assert model.pos_embed.shape == (1, 1 + 5 * 7, 24) and model.pos_embed.requires_grad
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("arguments", [{"reg_tokens": 2}, {"no_embed_class": True, "reg_tokens": 1}])
def test_position_embedding_like_timms(arguments: dict[str, Any], device: torch.device) -> None:
    """At the model's own size, with dynamic sizes or not, tokens are embedded as timm embeds them."""
    ours = micro(keep_rate=1.0, **arguments).to(device)
    fixed = micro(keep_rate=1.0, dynamic_img_size=False, **arguments).to(device)
    plain = VisionTransformer(**{**MICRO, "num_classes": 5, **arguments}).to(device).eval()
    x, larger = images().to(device), images(48, 40).to(device)
    ours.load_state_dict(plain.state_dict())
    fixed.load_state_dict(plain.state_dict())
    assert torch.equal(ours(x), plain(x))
    assert torch.equal(fixed(x), plain(x))
    assert ours(larger).shape == (2, 5)
    with pytest.raises(AssertionError, match="doesn't match model"):
        fixed(larger)


def test_sizes_that_are_no_multiple_of_the_patch() -> None:
    with pytest.raises(AssertionError, match=r"height \(36\) should be divisible by patch size \(8\)"):
        micro()(images(36, 32))


def test_compile_at_two_sizes(device: torch.device) -> None:
    model = micro().double().to(device)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for height, width in ((32, 32), (48, 48), (40, 64)):
        x = images(height, width, dtype=torch.float64).to(device)
        torch.testing.assert_close(compiled(x), model(x))


def test_export_with_dynamic_batch() -> None:
    model = micro()
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(model, (images(),), dynamic_shapes=({0: batch},))
    x = images().repeat(3, 1, 1, 1)
    torch.testing.assert_close(program.module()(x), model(x))


def test_a_missing_local_file_is_not_blamed_on_the_network() -> None:
    with pytest.raises(FileNotFoundError):
        models.deit_tiny(pretrained=True, pretrained_cfg_overlay={"file": "no-such-file.pth"})


def test_arguments_are_checked_before_anything_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(*_: Any, **__: Any) -> Any:
        raise AssertionError("the model was built")

    monkeypatch.setattr("evit_ext.models.deit.build_model_with_cfg", fetch)
    for wrong in ({"keep_rate": 2.0}, {"drop_loc": (3, 12)}, {"keep_rate": (0.5, 0.6)}):
        with pytest.raises(ValueError):
            models.deit_tiny(pretrained=True, **wrong)
    with pytest.raises(TypeError, match="fuse_token must be True or False, got 'no'"):
        models.deit_tiny(pretrained=True, fuse_token="no")
