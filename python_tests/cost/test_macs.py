"""count_macs against the papers' figures, against a hand count, and its promise to change nothing."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch

import evit_ext
from evit_ext import count_macs, models

# GMACs of DeiT at keep rates 1.0 … 0.5, with a fused token: the figures of the paper and of its model zoo.
KEEP_RATES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
PUBLISHED = {
    "tiny": ("1.25", "1.09", "0.94", "0.82", "0.72", "0.63"),
    "small": ("4.60", "4.02", "3.48", "3.03", "2.64", "2.31"),
    "base": ("17.56", "15.40", "13.33", "11.61", "10.09", "8.82"),
}


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_figures(size: str) -> None:
    model = getattr(models, f"deit_{size}")(weight_init="skip")
    counted = [count_macs(evit_ext.set_keep_rate(model, rate)) for rate in KEEP_RATES]
    assert tuple(f"{macs / 1e9:.2f}" for macs in counted) == PUBLISHED[size]


@pytest.mark.parametrize(("keep_rate", "gmacs"), [(1.0, "6.6"), (0.7, "4.7"), (0.5, "3.9")])
def test_published_figures_of_lvvit(keep_rate: float, gmacs: str) -> None:
    model = models.lvvit_small(keep_rate=keep_rate, weight_init="skip")
    expected = count_macs(model)
    assert f"{expected / 1e9:.1f}" == gmacs
    assert count_macs(model.train()) == expected


@pytest.mark.parametrize(
    ("img_size", "keep_rate", "gmacs"),
    [(256, 0.8, "4.61"), (272, 0.7, "4.56"), (288, 0.6, "4.50"), (304, 0.5, "4.44")],
)
def test_published_figures_at_higher_resolution(img_size: int, keep_rate: float, gmacs: str) -> None:
    model = models.deit_small(keep_rate=keep_rate, weight_init="skip")
    assert f"{count_macs(model, img_size) / 1e9:.2f}" == gmacs
    # Under their own names, the sizes and keep rates are the defaults.
    with torch.device("meta"):
        named = getattr(models, f"deit_small_{img_size}")(weight_init="skip")
        registered = timm.create_model(f"evit_deit_small_patch16_{img_size}", weight_init="skip")
    assert [f"{count_macs(model) / 1e9:.2f}" for model in (named, registered)] == [gmacs] * 2


def test_distillation_token() -> None:
    """One token more in every layer, and a head: DeiT-S distilled at keep rate 1, counted by hand."""
    with torch.device("meta"):
        macs = [
            count_macs(build(keep_rate=1.0)) for build in (models.deit_small, models.deit_small_distilled)
        ]
    attention = 2 * (198**2 - 197**2) * 384
    assert macs[1] - macs[0] == 12 * (12 * 384**2 + attention) + 384 * 1000


def test_hand_count(small_vit: Any) -> None:
    vit = small_vit(num_classes=7)
    channels, tokens, hidden = 24, 17, 96
    block = tokens * channels * (3 * channels + channels + 2 * hidden) + 2 * tokens * tokens * channels
    assert count_macs(vit) == 16 * channels * 3 * 8 * 8 + 4 * block + channels * 7


@pytest.mark.parametrize("fuse", [True, False])
def test_hand_count_of_a_reorganising_block(small_vit: Any, fuse: bool) -> None:
    vit = evit_ext.apply(small_vit(depth=1, num_classes=0), 0.5, drop_loc=[0], fuse_token=fuse)
    channels, hidden, left = 24, 96, 1 + 8 + fuse
    attention = 17 * channels * 4 * channels + 2 * 17 * 17 * channels
    assert count_macs(vit) == 16 * channels * 3 * 64 + attention + left * channels * 2 * hidden


@pytest.mark.parametrize("training", [True, False])
def test_changes_nothing(small_vit: Any, device: torch.device, training: bool) -> None:
    vit = evit_ext.apply(small_vit(drop_path_rate=0.1), 0.7).to(device).train(training)
    before = {key: (value.data_ptr(), value.clone()) for key, value in vit.state_dict().items()}
    parameters = list(vit.parameters())
    assert count_macs(vit) > 0
    assert vit.training == training
    assert all(a is b for a, b in zip(parameters, vit.parameters(), strict=True))
    for key, value in vit.state_dict().items():
        assert value.device.type == device.type
        assert value.data_ptr() == before[key][0]
        assert torch.equal(value, before[key][1])


def test_image_sizes(small_vit: Any) -> None:
    vit = small_vit(dynamic_img_size=True)
    assert count_macs(vit, 32) == count_macs(vit, (32, 32)) == count_macs(vit)
    assert count_macs(vit, (32, 64)) > count_macs(vit)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype_and_autocast_do_not_matter(small_vit: Any, dtype: torch.dtype) -> None:
    vit = evit_ext.apply(small_vit())
    expected = count_macs(vit)
    assert count_macs(vit.to(dtype)) == expected
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert count_macs(vit) == expected


def test_compiled_models_are_not_compiled_for_it(small_vit: Any) -> None:
    def backend(*args: Any) -> Any:
        raise AssertionError("compiled")

    vit = evit_ext.apply(small_vit())
    expected = count_macs(vit)
    assert count_macs(torch.compile(vit, backend=backend)) == expected
    vit.blocks[1].compile(backend=backend)
    assert count_macs(vit) == expected


def test_one_input_channel() -> None:
    vit = timm.create_model("vit_tiny_patch16_224", in_chans=1, depth=1, weight_init="skip")
    assert count_macs(vit) < count_macs(
        timm.create_model("vit_tiny_patch16_224", depth=1, weight_init="skip")
    )


def test_a_model_that_does_not_tell_its_size() -> None:
    convolution = torch.nn.Conv2d(3, 4, 3)
    with pytest.raises(ValueError, match="Conv2d does not tell the size of its images: give img_size"):
        count_macs(convolution)
    assert count_macs(convolution, 5) == 3 * 3 * 3 * 3 * 3 * 4
