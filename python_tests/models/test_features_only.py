"""features_only=True: timm's wrapper around the models, with features of all patches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models._features import FeatureGetterNet

import evit_ext
from evit_ext import models
from evit_ext.patching.block import ReorganizingBlock

pytestmark = pytest.mark.usefixtures("one_thread")

MICRO: dict[str, Any] = {"patch_size": 8, "embed_dim": 24, "num_heads": 2}
NAMES = ["deit_small", "deit_tiny_distilled", "lvvit_small"]


def net(name: str, **arguments: Any) -> FeatureGetterNet:
    arguments = {**MICRO, "img_size": 32, "depth": 8, "drop_loc": None, **arguments}
    return getattr(models, name)(features_only=True, **arguments)


def images(height: int = 32, width: int = 32) -> torch.Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0))


def stages(wrapper: FeatureGetterNet) -> list[int]:
    return [i for i, block in enumerate(wrapper.model.blocks) if isinstance(block, ReorganizingBlock)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("training", [False, True])
def test_shapes_and_gradients(name: str, training: bool) -> None:
    wrapper = net(name, keep_rate=0.5, out_indices=(0, 2, 5, 7)).train(training)
    assert isinstance(wrapper, FeatureGetterNet) and stages(wrapper) == [2, 4, 6]
    assert wrapper.feature_info.channels() == [24] * 4 and wrapper.feature_info.reduction() == [8] * 4
    with evit_ext.record_tokens(wrapper.model) as record:
        features = wrapper(images())
    assert [kept.shape[1] for kept in record.kept] == [8, 5, 3]  # it does drop patches
    assert [grid.shape for grid in features] == [(2, 24, 4, 4)] * 4
    sum((number + 1) * grid.square().sum() for number, grid in enumerate(features)).backward()
    for parameter_name, parameter in wrapper.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), parameter_name


@pytest.mark.parametrize("name", NAMES)
def test_features_are_those_of_the_whole_model(name: str) -> None:
    wrapper = net(name, keep_rate=0.5, out_indices=[1, 5]).eval()
    whole = getattr(models, name)(**MICRO, img_size=32, depth=8, drop_loc=None, keep_rate=0.5).eval()
    assert not whole.load_state_dict(wrapper.model.state_dict(), strict=False).unexpected_keys
    expected = whole.forward_intermediates(images(), indices=[1, 5], intermediates_only=True)
    for grid, other in zip(wrapper(images()), expected, strict=True):
        assert torch.equal(grid, other)


def test_stages_are_those_of_the_whole_model() -> None:
    """timm cuts off the blocks behind the last feature: 2, 4 and 6 of 8 still are where tokens reorganise."""
    rates = (0.5, 0.75, 1.0)
    wrapper = net("deit_small", keep_rate=rates, out_indices=(1, 4))
    assert len(wrapper.model.blocks) == 5 and stages(wrapper) == [2, 4]
    assert [wrapper.model.blocks[i].keep_rate for i in (2, 4)] == [0.5, 0.75]
    assert [grid.shape for grid in wrapper(images())] == [(2, 24, 4, 4)] * 2
    assert stages(net("deit_small", out_indices=(1,))) == []
    assert [grid.shape for grid in net("deit_small", out_indices=(1,))(images())] == [(2, 24, 4, 4)]


@pytest.mark.parametrize("name", NAMES)
def test_keep_rate_1_is_the_plain_model(name: str) -> None:
    wrapper = net(name, keep_rate=1.0).eval()
    features = wrapper(images())
    assert len(features) == 3  # the last ones, as of timm's
    evit_ext.remove(wrapper.model)
    for grid, other in zip(features, wrapper(images()), strict=True):
        assert torch.equal(grid, other)
    evit_ext.apply(wrapper.model, 0.5)
    assert not torch.equal(wrapper(images())[2], features[2])


@pytest.mark.parametrize(
    ("name", "channels"),
    [
        ("evit_deit_small_patch16_224", 384),
        ("evit_deit_small_patch16_256", 384),
        ("evit_deit_tiny_distilled_patch16_224", 192),
        ("evit_lvvit_t_patch16_224", 240),
    ],
)
def test_by_timms_name(name: str, channels: int) -> None:
    wrapper = timm.create_model(name, features_only=True, out_indices=(2, 5, 8, 11)).eval()
    assert stages(wrapper) == [3, 6, 9]
    height = int(name[-3:])
    with torch.no_grad():
        assert [grid.shape[1:] for grid in wrapper(images(height, 160))] == [(channels, height // 16, 10)] * 4


def test_without_fused_tokens() -> None:
    assert [grid.shape for grid in net("lvvit_small", fuse_token=False)(images())] == [(2, 24, 4, 4)] * 3


@pytest.mark.parametrize("name", NAMES)
def test_pretrained(tmp_path: Path, name: str) -> None:
    """DeiT's and LV-ViT's weights, without their heads, into the model inside."""
    source = getattr(models, name)(**MICRO, img_size=32, depth=8, drop_loc=None)
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    overlay = {"file": str(tmp_path / "weights.pth")}
    wrapper = net(name, pretrained=True, pretrained_cfg_overlay=overlay, out_indices=(7,), img_size=48)
    assert torch.equal(wrapper.model.blocks[7].mlp.fc1.weight, source.blocks[7].mlp.fc1.weight)
    assert [grid.shape for grid in wrapper(images(48, 48))] == [(2, 24, 6, 6)]


def test_refusals() -> None:
    with pytest.raises(ValueError, match="feature_cls must be 'getter'.*got 'hook'"):
        net("deit_small", feature_cls="hook")
    with pytest.raises(ValueError, match="features_only needs a token for every patch, which a DynamicViT"):
        models.dynamicvit_tiny(features_only=True)
    with pytest.raises(ValueError, match="which a DynamicViT does not have"):
        timm.create_model("dynamicvit_deit_small_patch16_224", features_only=True, out_indices=(2, 5))
    with pytest.raises(ValueError, match=r"keep_rate must be in \(0, 1\], got 2"):
        net("lvvit_small", keep_rate=2)
