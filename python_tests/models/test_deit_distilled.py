"""The distilled DeiTs: equal to timm's at keep rate 1, to the slow EViT below, at any size; both heads."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from slow_evit import slow_bicubic, slow_evit
from timm.models.deit import VisionTransformerDistilled

import evit_ext
from evit_ext import models
from evit_ext.models.deit import DeiT, DistilledDeiT

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = ("tiny", "small", "base")
MICRO: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 2}


def micro(**arguments: Any) -> DistilledDeiT:
    """A small model in eval mode, with weights so large that every token tells."""
    model = models.deit_tiny_distilled(**{**MICRO, "drop_loc": None, "num_classes": 5, **arguments}).eval()
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    return model


def plain(model: DistilledDeiT, **arguments: Any) -> VisionTransformerDistilled:
    """Return timm's own model with the weights of `model`."""
    vit = VisionTransformerDistilled(**{**MICRO, "num_classes": 5, **arguments}).to(model.pos_embed)
    vit.load_state_dict(model.state_dict())
    return vit.eval()


def images(height: int = 32, width: int = 32, **options: Any) -> torch.Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0), **options)


# --- names


@pytest.mark.parametrize("size", SIZES)
def test_name_and_weights_are_those_of_timm(size: str) -> None:
    with torch.device("meta"):
        ours = getattr(models, f"deit_{size}_distilled")()
        timms = timm.create_model(f"deit_{size}_distilled_patch16_224")
    assert isinstance(ours, (DeiT, VisionTransformerDistilled))
    assert [(k, v.shape) for k, v in ours.state_dict().items()] == [
        (k, v.shape) for k, v in timms.state_dict().items()
    ]
    cfg = timm.get_pretrained_cfg(f"evit_deit_{size}_distilled_patch16_224")
    assert cfg.hf_hub_id == f"timm/deit_{size}_distilled_patch16_224.fb_in1k"
    assert cfg.classifier == ("head", "head_dist") and cfg.input_size == (3, 224, 224)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"reg_tokens": 2}, "no reg_tokens=2"),
        ({"no_embed_class": True}, "no no_embed_class=True"),
        ({"global_pool": "avg"}, "no global_pool='avg'"),
    ],
)
def test_refusals(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"reads its class and distillation token: {message}"):
        micro(**arguments)


def test_pretrained_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise ConnectionError("refused")

    monkeypatch.setattr("evit_ext.models.deit.build_model_with_cfg", fail)
    with pytest.raises(RuntimeError, match="weights of deit_base_distilled_patch16_224 could not be fetched"):
        models.deit_base_distilled(pretrained=True)


# --- what it computes


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("both", [True, False])
def test_keep_rate_1_is_timms(both: bool, dynamic: bool, device: torch.device) -> None:
    model = micro(keep_rate=1.0, dynamic_img_size=dynamic)
    vit = plain(model).to(device)
    model.to(device)
    x = images().to(device)
    assert torch.equal(model(x), vit(x))
    for each in (model, vit):
        each.train().set_distilled_training(both)
    ours, theirs = model(x), vit(x)
    assert isinstance(ours, tuple) == isinstance(theirs, tuple) == both
    assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])
    ours, theirs = (each.forward_head(each.forward_features(x), pre_logits=True) for each in (model, vit))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("rates", [(0.7, 0.7, 0.7), (0.3, 0.9, 0.6)])
def test_agrees_with_the_slow_implementation(
    rates: tuple[float, ...], fuse: bool, device: torch.device
) -> None:
    model = micro(keep_rate=rates, fuse_token=fuse).double()
    vit = plain(model).to(device)
    model.to(device)
    x = images(dtype=torch.float64).to(device)
    expected, kept, scores = slow_evit(vit, x, rates, (1, 2, 3), fuse)
    with evit_ext.record_tokens(model) as record:
        logits = model(x)
    torch.testing.assert_close(logits, expected, rtol=1e-11, atol=1e-12)
    for ours, theirs in zip(record.kept, kept, strict=True):
        assert torch.equal(ours.sort(dim=1).values, theirs.sort(dim=1).values)
    for ours, theirs in zip(record.scores, scores, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)
    with torch.no_grad():  # another operator
        torch.testing.assert_close(model(x), expected, rtol=1e-11, atol=1e-12)
    # Both heads, and the gradients of both.
    for each in (model, vit):
        each.train().set_distilled_training()
    both, expected_both = model(x), slow_evit(vit, x, rates, (1, 2, 3), fuse)[0]
    for ours, theirs in zip(both, expected_both, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)
    (both[0].sum() + both[1].square().sum()).backward()
    (expected_both[0].sum() + expected_both[1].square().sum()).backward()
    for (name, ours), theirs in zip(model.named_parameters(), vit.parameters(), strict=True):
        torch.testing.assert_close(
            ours.grad, theirs.grad, rtol=1e-9, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_prefix_tokens_are_never_dropped() -> None:
    model = micro(keep_rate=0.01)
    tokens = model.forward_features(images())
    assert tokens.shape == (2, 2 + 1 + 1, 24)
    assert {block.num_prefix_tokens for block in model.blocks[1:]} == {2}


def test_heads() -> None:
    model = micro(keep_rate=0.6)
    x = images()
    tokens = model.forward_features(x)
    by_class, by_distillation = model.head(tokens[:, 0]), model.head_dist(tokens[:, 1])
    torch.testing.assert_close(model(x), (by_class + by_distillation) / 2)
    model.set_distilled_training(True)
    assert torch.equal(model(x), (by_class + by_distillation) / 2)  # in training only
    ours = model.train()(x)
    torch.testing.assert_close(ours, (by_class, by_distillation))
    model.reset_classifier(3)
    assert model.head_dist.weight.shape == (3, 24) and model.eval()(x).shape == (2, 3)
    assert model.get_classifier() == (model.head, model.head_dist)
    model.reset_classifier(0)
    assert model(x).shape == (2, 24) and not model.head_dist.state_dict()


def test_groups_of_parameters() -> None:
    model = micro()
    assert {"pos_embed", "cls_token", "dist_token"} <= model.no_weight_decay()
    stem = model.group_matcher()["stem"]
    names = {name for name, _ in model.named_parameters() if re.match(stem, name)}
    projection = {"patch_embed.proj.weight", "patch_embed.proj.bias"}
    assert names == {"cls_token", "dist_token", "pos_embed"} | projection
    assert {"head_dist.weight", "head.weight"} <= {name for name, _ in model.named_parameters()}


def test_remove_and_copy() -> None:
    model = micro(keep_rate=0.6)
    expected = model(images())
    assert torch.equal(copy.deepcopy(model)(images()), expected)
    evit_ext.remove(model)
    assert torch.equal(model(images()), plain(model)(images()))


def test_compile_at_two_sizes(device: torch.device) -> None:
    model = micro(keep_rate=0.7).double().to(device)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for height, width in ((32, 32), (48, 48), (40, 64)):
        x = images(height, width, dtype=torch.float64).to(device)
        torch.testing.assert_close(compiled(x), model(x))
    model.train().set_distilled_training(True)
    torch.testing.assert_close(compiled(x), model(x))


def test_export_with_dynamic_batch() -> None:
    model = micro()
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(model, (images(),), dynamic_shapes=({0: batch},))
    x = images().repeat(3, 1, 1, 1)
    torch.testing.assert_close(program.module()(x), model(x))


# --- images and weights of other sizes


def resized(model: DistilledDeiT, height: int, width: int) -> VisionTransformerDistilled:
    """Return timm's model for another image size, its embedding resized by the oracle."""
    vit = VisionTransformerDistilled(**{**MICRO, "img_size": (height, width), "num_classes": 5})
    state = dict(model.state_dict())
    patches = slow_bicubic(state["pos_embed"][0, 2:], height // 8, width // 8)
    state["pos_embed"] = torch.cat([state["pos_embed"][0, :2], patches]).unsqueeze(0)
    vit.to(model.pos_embed).load_state_dict(state)
    return vit.eval()


@pytest.mark.parametrize(("height", "width"), [(48, 48), (24, 24), (32, 56), (40, 16), (32, 32)])
def test_images_of_any_size(height: int, width: int, device: torch.device) -> None:
    model = micro(keep_rate=0.6).double().to(device)
    x = images(height, width, dtype=torch.float64).to(device)
    expected, _, _ = slow_evit(resized(model, height, width), x, (0.6, 0.6, 0.6), (1, 2, 3))
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-12)
    model.set_input_size(img_size=(height, width))
    assert model.pos_embed.shape[1] == 2 + height * width // 64
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("way", ["state dict", "load_checkpoint", "pretrained"])
def test_weights_of_another_size(tmp_path: Path, way: str) -> None:
    source = micro(keep_rate=0.6)
    file = tmp_path / "weights.pth"
    torch.save({"model": source.state_dict()}, file)
    arguments: dict[str, Any] = {**MICRO, "img_size": (48, 40), "drop_loc": None, "keep_rate": 0.6}
    if way == "pretrained":
        overlay = {"file": str(file), "num_classes": 5}
        arguments |= {"pretrained": True, "pretrained_cfg_overlay": overlay}
    model = models.deit_tiny_distilled(**arguments, num_classes=5).eval()
    if way == "state dict":
        model.load_state_dict(source.state_dict())
    elif way == "load_checkpoint":
        loaded = evit_ext.load_checkpoint(model, file, resize_pos_embed=True)
        assert loaded.kind == "distilled DeiT" and loaded.resized_keys == ("pos_embed",)
    x = images(48, 40)
    expected, _, _ = slow_evit(resized(source, 48, 40), x, (0.6, 0.6, 0.6), (1, 2, 3))
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


def test_pretrained_for_other_classes(tmp_path: Path) -> None:
    source = micro(num_classes=1000)
    torch.save({"model": source.state_dict()}, tmp_path / "weights.pth")
    overlay = {"file": str(tmp_path / "weights.pth")}
    model = models.deit_tiny_distilled(
        **MICRO, drop_loc=None, num_classes=7, pretrained=True, pretrained_cfg_overlay=overlay
    )
    assert torch.equal(model.dist_token, source.dist_token)
    assert torch.equal(model.pos_embed, source.pos_embed)
    assert model.head.weight.shape == model.head_dist.weight.shape == (7, 24)
