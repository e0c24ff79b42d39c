"""What is said of each stage, against record_tokens itself."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import evit_ext
from evit_ext import models
from evit_ext.tokens import EViT, ToMe
from evit_ext.tokens.stage import find_stages
from evit_ext.visualize import meaning_of_scores, surviving_patches, view_images

pytestmark = pytest.mark.usefixtures("one_thread")


def test_as_recorded(variant: Any) -> None:
    evit = evit_ext.apply(variant(), 0.6)
    images = torch.randn(3, 3, 32, 32)
    views = view_images(evit, images, [0.7, 0.4])
    assert [view.grid for view in views] == [(4, 4)] * 3
    with torch.inference_mode():
        for number, rate in enumerate((0.7, 0.4)):
            evit_ext.set_keep_rate(evit, rate)
            with evit_ext.record_tokens(evit) as record:
                logits = evit(images)
            for image, view in enumerate(views):
                found = view.rates[number]
                assert found.keep_rate == rate and found.probabilities is not None
                torch.testing.assert_close(found.probabilities, logits[image].softmax(0))
                before = set(range(16))
                for stage, kept, scores, entered in zip(
                    found.stages, record.kept, record.scores, [None, *record.kept], strict=False
                ):
                    ids = {int(patch) for patch in kept[image] if patch >= 0}
                    assert set(stage.kept.flatten().nonzero().flatten().tolist()) == ids
                    assert stage.dropped == len(before) - len(ids) and stage.fused
                    order = range(16) if entered is None else entered[image].tolist()
                    expected = dict(zip(order, scores[image].tolist(), strict=False))
                    for patch, score in enumerate(stage.scores.flatten().tolist()):
                        assert score == expected[patch] if patch in before else math.isnan(score)
                    before = ids
                assert found.macs == evit_ext.count_macs(evit)
        evit_ext.set_keep_rate(evit, 1.0)
        dense = evit(images).softmax(1)
    for image, view in enumerate(views):
        assert view.dense.probabilities is not None and view.dense.macs > view.rates[0].macs
        torch.testing.assert_close(view.dense.probabilities, dense[image], atol=1e-5, rtol=1e-5)


def test_the_model_is_as_it_was(small_vit: Any) -> None:
    evit = evit_ext.apply(small_vit(), [0.9, 0.8, 0.7]).train()
    view_images(evit, torch.randn(1, 3, 32, 32), [0.5])
    assert evit.training and [evit.blocks[number].keep_rate for number in (1, 2, 3)] == [0.9, 0.8, 0.7]
    with pytest.raises(ValueError, match=r"keep_rate must be in \(0, 1\], got 2"):
        view_images(evit, torch.randn(1, 3, 32, 32), [0.5, 2])
    assert evit.training and [evit.blocks[number].keep_rate for number in (1, 2, 3)] == [0.9, 0.8, 0.7]


def test_images_that_are_not_square(small_vit: Any) -> None:
    evit = evit_ext.apply(small_vit(dynamic_img_size=True, reg_tokens=2), 0.5)
    (view,) = view_images(evit, torch.randn(1, 3, 24, 48), [0.5])
    assert view.grid == (3, 6) and view.rates[0].stages[0].kept.shape == (3, 6)
    assert int(view.rates[0].stages[0].kept.sum()) == 9
    padding = evit_ext.apply(small_vit(dynamic_img_size=True, dynamic_img_pad=True), 0.5)
    with pytest.raises(ValueError, match="images of 30x48 pixels are padded to whole patches of 8x8"):
        view_images(padding, torch.randn(1, 3, 30, 48), [0.5])


def test_without_fusion_and_without_classes(small_vit: Any) -> None:
    evit = evit_ext.apply(small_vit(num_classes=0), 0.5, fuse_token=False)
    (view,) = view_images(evit, torch.randn(1, 3, 32, 32), [0.5])
    assert view.dense.probabilities is None and view.rates[0].probabilities is None
    assert [stage.dropped for stage in view.rates[0].stages] == [8, 4, 2]
    assert not any(stage.fused for stage in view.rates[0].stages)


@pytest.mark.parametrize("build", [models.dynamicvit_tiny, models.lvvit_tiny, models.deit_tiny])
def test_models_of_this_package(build: Any) -> None:
    model: Any = build(img_size=64, num_classes=7).eval()
    (view,) = view_images(model, torch.randn(1, 3, 64, 64), [0.5])
    assert view.grid == (4, 4) and view.dense.probabilities is not None
    assert len(view.dense.probabilities) == 7 and int(view.rates[0].stages[0].kept.sum()) == 8
    scores = view.rates[0].stages[0].scores
    assert bool(((scores >= 0) & (scores <= 1)).all())
    probability = build is models.dynamicvit_tiny
    assert meaning_of_scores(model).startswith("probability" if probability else "attention of the class")


def test_scores_without_a_class_token(small_vit: Any) -> None:
    evit = evit_ext.apply(small_vit(class_token=False, global_pool="avg"), 0.5)
    assert meaning_of_scores(evit).startswith("attention of all tokens")
    assert view_images(evit, torch.randn(1, 3, 32, 32), [0.5])[0].rates[0].stages[0].dropped == 8


def test_of_transformers() -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.ViTConfig(
        image_size=32, patch_size=8, hidden_size=24, num_hidden_layers=4, num_attention_heads=2,
        intermediate_size=48, num_labels=3,
    )  # fmt: skip
    evit = evit_ext.apply(transformers.ViTForImageClassification(config).eval(), 0.5)
    (view,) = view_images(evit, torch.randn(1, 3, 32, 32), [0.5])
    assert view.grid == (4, 4) and view.dense.probabilities is not None
    assert len(view.dense.probabilities) == 3 and int(view.rates[0].stages[0].kept.sum()) == 8


def test_errors(small_vit: Any) -> None:
    images = torch.randn(1, 3, 32, 32)
    with pytest.raises(ValueError, match="call evit_ext.apply first"):
        view_images(small_vit(), images, [0.5])
    evit = evit_ext.apply(small_vit(), 0.5)
    with pytest.raises(ValueError, match="keep_rates must have at least one"):
        view_images(evit, images, [])
    with pytest.raises(ValueError, match=r"images must be \[B, channels, height, width\], got \[3, 32, 32\]"):
        view_images(evit, images[0], [0.5])


@pytest.mark.parametrize("broken", ["head.weight", "blocks.0.attn.qkv.weight"])
def test_a_model_that_computes_nan(small_vit: Any, broken: str) -> None:
    evit = evit_ext.apply(small_vit(), 0.5)
    evit.get_parameter(broken).data[0] = float("nan")
    with pytest.raises(ValueError, match="at keep rate 1 the model computes NaN"):
        view_images(evit, torch.randn(1, 3, 32, 32), [0.5])


def test_surviving_patches() -> None:
    kept = [torch.tensor([[0, 2, 5], [1, 3, 4]]), torch.tensor([[0, 5], [3, -1]])]
    first, second = surviving_patches(kept, 6)
    assert first.tolist() == [
        [True, False, True, False, False, True],
        [False, True, False, True, True, False],
    ]
    assert second.tolist() == [[True, False, False, False, False, True], [False] * 3 + [True, False, False]]


def test_groups_of_merged_tokens_and_the_rule_afterwards(small_vit: Any) -> None:
    vit = evit_ext.apply(small_vit(), rule=ToMe(r=3), drop_loc=[0, 2])
    images = torch.randn(2, 3, 32, 32)
    views = view_images(vit, images, [0.6])
    assert [stage.rule for stage in find_stages(vit)] == [ToMe(r=3)] * 2
    evit_ext.set_keep_rate(vit, 0.6)
    with torch.no_grad(), evit_ext.record_tokens(vit) as record:
        vit(images)
    for image, view in enumerate(views):
        for number, stage in enumerate(view.rates[0].stages):
            places = record.trail.places(number + 1)
            assert places is not None and stage.groups is not None and not stage.fused
            assert torch.equal(stage.groups.flatten(), places[image])
        assert all(stage.groups is None for stage in view.dense.stages)
    assert meaning_of_scores(vit).startswith("none; tokens are merged")
    fused = evit_ext.apply(small_vit(), rule=EViT(0.6))
    assert all(stage.groups is None for stage in view_images(fused, images, [0.6])[0].rates[0].stages)
