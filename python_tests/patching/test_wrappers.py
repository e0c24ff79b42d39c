"""Blocks and models inside wrappers: what reduces tokens is found there, or the sentence says where it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import evit_ext
from evit_ext.tokens.stage import find_stages

pytestmark = pytest.mark.usefixtures("one_thread")

RATE, DROP_LOC = 0.6, (2, 4, 6)


def vit(**arguments: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"img_size": 64, "patch_size": 8, "embed_dim": 48, "depth": 8, "num_heads": 3, "num_classes": 10}
    return VisionTransformer(**{**sizes, **arguments}).eval()


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def compiled(block: nn.Module) -> nn.Module:
    return torch.compile(block, backend="eager")  # type: ignore[return-value]


@pytest.mark.parametrize("wrapped", ["blocks", "some blocks", "model", "peft"])
@pytest.mark.parametrize("wrap", [checkpoint_wrapper, compiled], ids=["checkpoint", "compile"])
def test_stages_are_found_inside_wrappers(wrap: Callable[..., Any], wrapped: str) -> None:
    dense, model = vit(), evit_ext.apply(vit(), RATE, DROP_LOC)
    expected = dense(images())
    for number in range(8 if wrapped == "blocks" else 4 if wrapped == "some blocks" else 0):
        model.blocks[7 - number] = wrap(model.blocks[7 - number])
    outer = wrap(model) if wrapped == "model" else model
    if wrapped == "peft":  # PeftModel keeps the model in .base_model.model
        outer, outer.base_model = nn.Module(), nn.Module()
        outer.base_model.model = model
    model(images())
    evit_ext.set_keep_rate(outer, 0.3)
    assert [stage.keep_rate for stage in find_stages(model)] == [0.3] * 3
    with evit_ext.record_tokens(outer) as record:
        model(images())
    assert [kept.shape[1] for kept in record.kept] == [20, 7, 3]
    (grid,) = model.forward_intermediates(images(), [7], intermediates_only=True)
    assert grid.shape == (2, 48, 8, 8)
    evit_ext.prepack(evit_ext.prepack(outer), False)
    with evit_ext.Oracle(dense, DROP_LOC).guide(model):
        model(images())
    evit_ext.remove(outer)
    assert not find_stages(model) and torch.equal(model(images()), expected)


def test_the_model_that_was_applied_is_found_beside_others() -> None:
    both = nn.ModuleDict({"teacher": vit(), "student": evit_ext.apply(vit(), RATE, DROP_LOC)})
    evit_ext.set_keep_rate(both, 1.0)
    assert torch.equal(both["student"](images()), both["teacher"](images()))
    evit_ext.remove(both)
    assert not find_stages(both)


def test_two_models_in_one() -> None:
    both = nn.ModuleList([evit_ext.apply(vit(), RATE), evit_ext.apply(vit(), RATE)])
    with pytest.raises(ValueError, match="ModuleList holds several models that reduce tokens: pass one"):
        evit_ext.set_keep_rate(both, 0.5)


def test_a_wrapped_block_is_refused_by_apply() -> None:
    model = vit()
    model.blocks[4] = checkpoint_wrapper(model.blocks[4])
    with pytest.raises(ValueError, match="block 4 is wrapped in a CheckpointWrapper: call evit"):
        evit_ext.apply(model, RATE)


def test_policies_by_class_find_reorganising_blocks() -> None:
    model = evit_ext.apply(vit(), RATE)
    assert all(isinstance(block, Block) for block in model.blocks)


@pytest.mark.parametrize(
    ("path", "named"),
    [
        ("visual", r"\(.visual\)"),
        ("base_model.model", r"\(.base_model.model\)"),
        ("model.vision_tower", r"\(.model.vision_tower\)"),
        ("trunk", r"\(.trunk\)"),
    ],
)
def test_hints_where_the_vision_transformer_is(path: str, named: str) -> None:
    outer: Any = nn.Module()
    inner = outer
    *folders, last = path.split(".")
    for folder in folders:
        setattr(inner, folder, nn.Module())
        inner = getattr(inner, folder)
    setattr(inner, last, vit())
    with pytest.raises(ValueError, match=f"pass the model inside the wrapper {named}"):
        evit_ext.apply(outer)
