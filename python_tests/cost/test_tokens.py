"""Counted tokens are those that a forward really has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import evit_ext
from evit_ext import models
from evit_ext.cost.tokens import count_tokens
from evit_ext.tokens.stage import find_stages


def seen(vit: nn.Module, blocks: list[Any], size: tuple[int, int], prefix: int) -> list[int]:
    """The patch tokens that enter the first of the `blocks`, and those that leave each."""
    counts: list[int] = []

    def count(block: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        counts.extend([inputs[0].shape[1] - prefix] * (not counts) + [output.shape[1] - prefix])

    hooks = [block.register_forward_hook(count) for block in blocks]
    vit(torch.randn(1, 3, *size))
    for hook in hooks:
        hook.remove()
    return counts


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("rates", [0.7, 1.0, (0.55, 1.0, 0.5)], ids=str)
def test_of_an_evit(variant: Callable[..., Any], rates: Any, fuse: bool) -> None:
    vit = evit_ext.apply(variant(), rates, fuse_token=fuse)
    counts = count_tokens(vit, (32, 32))
    assert counts == seen(vit, find_stages(vit), (32, 32), vit.num_prefix_tokens)
    assert counts[0] == 16 and len(counts) == 4


def test_of_images_of_other_sizes(small_vit: Callable[..., Any]) -> None:
    vit = evit_ext.apply(small_vit(dynamic_img_size=True, dynamic_img_pad=True), 0.6)
    counts = count_tokens(torch.compile(vit), (44, 60))
    assert counts == seen(vit, find_stages(vit), (44, 60), 1)
    assert counts[0] == 6 * 8


def test_of_lvvit_and_dynamicvit() -> None:
    small: dict[str, Any] = {"img_size": 48, "embed_dim": 48, "depth": 4, "num_heads": 2, "num_classes": 5}
    small["drop_loc"] = (1, 2, 3)
    lvvit = models.lvvit_small(keep_rate=0.6, **small).eval()
    assert count_tokens(lvvit, (48, 48)) == seen(lvvit, find_stages(lvvit), (48, 48), 1)
    rival = models.dynamicvit_small(keep_rate=0.6, **small).eval()
    dropping = [rival.blocks[number] for number in rival.drop_loc]
    counts = count_tokens(rival, (48, 48))
    assert counts[0] == 9 and counts[1:] == seen(rival, dropping, (48, 48), 1)[1:]


def test_of_a_model_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        image_size=32,
        patch_size=8,
        hidden_size=24,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=48,
    )
    vit = evit_ext.apply(transformers.ViTForImageClassification(config).eval(), 0.6)
    assert count_tokens(vit, (32, 32)) == seen(vit, find_stages(vit), (32, 32), 1)


def test_a_model_that_drops_nothing_has_none(small_vit: Callable[..., Any]) -> None:
    assert count_tokens(small_vit(), (32, 32)) == count_tokens(nn.Linear(2, 2), (32, 32)) == []
