"""layer_costs against counts by hand, and its promise to add up to the whole and to change nothing."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import timm
import torch

import evit_ext
from evit_ext import layer_costs, models
from evit_ext.cost.layers import LayerCost
from evit_ext.models.by_name import create_evit


def by_name(model: Any, **arguments: Any) -> dict[str, LayerCost]:
    return {layer.name: layer for layer in layer_costs(model, **arguments)}


def block_macs(tokens_in: int, tokens_out: int, channels: int) -> int:
    """Attention of `tokens_in` tokens: 4 projections and 2 products; MLP of `tokens_out`, 4 times as wide."""
    return 4 * tokens_in * channels**2 + 2 * tokens_in**2 * channels + 8 * tokens_out * channels**2


def test_deit_by_hand() -> None:
    layers = by_name(models.deit_small(keep_rate=0.7, weight_init="skip"))
    # ceil(0.7 * 196) = 138; with the class token and the fused one 140; ceil(0.7 * 139) = 98; and so on.
    tokens = [197, 197, 197, 197, 140, 140, 140, 100, 100, 100, 72, 72, 72]
    parameters = 12 * 384**2 + (3 + 1 + 4 + 1 + 4) * 384
    stages = {3: (196, 138, 58), 6: (139, 98, 41), 9: (99, 70, 29)}
    for number, (before, after) in enumerate(pairwise(tokens)):
        expected = LayerCost(
            f"blocks.{number}",
            parameters,
            block_macs(before, after, 384),
            before,
            after,
            *stages.get(number, (None, None, None)),
        )
        assert layers[f"blocks.{number}"] == expected
    assert layers["patch_embed"] == LayerCost("patch_embed", 385 * 768 - 768 + 384, 196 * 768 * 384)
    assert layers["head"] == LayerCost("head", 385 * 1000, 384 * 1000)
    assert layers[""] == LayerCost("", 198 * 384, 0)
    names = list(layers)
    assert names[:3] == ["", "patch_embed", "blocks.0"] and names[-2:] == ["norm", "head"]


def test_predictors_of_a_dynamicvit() -> None:
    model = models.dynamicvit_tiny(keep_rate=0.7, weight_init="skip").eval()
    layers = by_name(model)
    names = list(layers)
    assert names.index("score_predictor.0") == names.index("blocks.3") - 1
    assert [layers[f"score_predictor.{stage}"][5:] for stage in range(3)] == [
        (196, 137, 0),
        (137, 96, 0),
        (96, 67, 0),
    ]
    assert layers["blocks.3"].tokens_in == 138
    trained = by_name(model.train())
    assert trained["score_predictor.0"].kept is None
    assert sum(layer.macs for layer in trained.values()) == evit_ext.count_macs(model)


@pytest.mark.parametrize(
    "name",
    [
        "lvvit_tiny",
        "dynamicvit_tiny",
        "vit_base_patch16_siglip_224",
        "eva02_tiny_patch14_224",
        "beit_base_patch16_224",
        "vit_tiny_r_s16_p8_224",
        "vit_small_patch16_rope_mixed_224",
        "vit_base_patch16_rpn_224",
    ],
)
def test_parts_add_up_to_the_whole(name: str) -> None:
    with torch.device("meta"):
        model = create_evit(name).eval()
    layers = layer_costs(model)
    assert sum(layer.macs for layer in layers) == evit_ext.count_macs(model)
    assert sum(layer.parameters for layer in layers) == sum(p.numel() for p in model.parameters())
    assert sum(layer.kept is not None for layer in layers) == 3


def test_products_outside_of_modules_are_counted() -> None:
    """A model whose last product is of its forward."""

    class Scaled(timm.models.VisionTransformer):  # type: ignore[misc]
        def forward(self, x: torch.Tensor) -> Any:
            features = self.forward_features(x)[:, 0]
            return features @ features.new_ones(features.shape[1], 7)

    model = Scaled(img_size=32, embed_dim=48, depth=2, num_heads=2, num_classes=0)
    assert by_name(model)[""] == LayerCost("", (1 + 5) * 48, 48 * 7)


def test_other_sizes_wrappers_and_nothing_changed() -> None:
    model = models.deit_tiny(keep_rate=[0.5, 1.0, 0.9], fuse_token=False)
    before = {name: (tensor, tensor.clone()) for name, tensor in model.state_dict(keep_vars=True).items()}
    layers = by_name(torch.nn.parallel.DataParallel(model), img_size=(32, 64))
    assert layers["blocks.3"][3:] == (9, 5, 8, 4, 0)
    assert layers["blocks.6"][3:] == (5, 5, 4, 4, 0)
    assert not any(module._forward_hooks for module in model.modules())
    for name, tensor in model.state_dict(keep_vars=True).items():
        assert tensor is before[name][0] and torch.equal(tensor, before[name][1])


def test_a_model_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(num_hidden_layers=4, hidden_size=48, num_attention_heads=2)
    vit = evit_ext.apply(transformers.ViTForImageClassification(config), keep_rate=0.7)
    layers = by_name(vit, img_size=224)
    assert layers["vit.layers.1"][3:] == (197, 140, 196, 138, 58)
    assert sum(layer.macs for layer in layers.values()) == evit_ext.count_macs(vit, 224)


def test_errors() -> None:
    with pytest.raises(ValueError, match="Linear has no blocks that are known"):
        layer_costs(torch.nn.Linear(2, 2))
