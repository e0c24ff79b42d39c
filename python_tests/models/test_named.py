"""The functions that build models by name: signatures, docstrings, names, defaults."""

from __future__ import annotations

import importlib
import inspect
import pickle
from typing import Any, get_type_hints

import pytest
import timm
import torch

from evit_ext import models
from evit_ext.models.deit import DeiT, DistilledDeiT
from evit_ext.models.lvvit import LVViT
from evit_ext.patching.block import ReorganizingBlock

pytestmark = pytest.mark.usefixtures("one_thread")

PARAMETERS = ["keep_rate", "fuse_token", "drop_loc", "img_size", "num_classes", "pretrained", "timm_kwargs"]
PAPERS = (3, 6, 9)

#: For each function: its timm name, class and defaults of keep_rate, drop_loc and img_size.
NAMED: dict[str, tuple[str, type, float, Any, int]] = {
    "deit_tiny": ("evit_deit_tiny_patch16_224", DeiT, 0.7, PAPERS, 224),
    "deit_small": ("evit_deit_small_patch16_224", DeiT, 0.7, PAPERS, 224),
    "deit_base": ("evit_deit_base_patch16_224", DeiT, 0.7, PAPERS, 224),
    "deit_small_256": ("evit_deit_small_patch16_256", DeiT, 0.8, PAPERS, 256),
    "deit_small_272": ("evit_deit_small_patch16_272", DeiT, 0.7, PAPERS, 272),
    "deit_small_288": ("evit_deit_small_patch16_288", DeiT, 0.6, PAPERS, 288),
    "deit_small_304": ("evit_deit_small_patch16_304", DeiT, 0.5, PAPERS, 304),
    "deit_tiny_distilled": ("evit_deit_tiny_distilled_patch16_224", DistilledDeiT, 0.7, PAPERS, 224),
    "deit_small_distilled": ("evit_deit_small_distilled_patch16_224", DistilledDeiT, 0.7, PAPERS, 224),
    "deit_base_distilled": ("evit_deit_base_distilled_patch16_224", DistilledDeiT, 0.7, PAPERS, 224),
    "lvvit_tiny": ("evit_lvvit_t_patch16_224", LVViT, 0.7, None, 224),
    "lvvit_small": ("evit_lvvit_s_patch16_224", LVViT, 0.7, None, 224),
    "lvvit_medium": ("evit_lvvit_m_patch16_224", LVViT, 0.7, None, 224),
    "lvvit_large": ("evit_lvvit_l_patch16_224", LVViT, 0.7, None, 224),
}


def test_all_of_them() -> None:
    dynamicvits = {f"dynamicvit_{size}" for size in ("tiny", "small", "base")}
    assert set(models.__all__) == set(NAMED) | dynamicvits
    for name, (registered, *_) in NAMED.items():
        module = importlib.import_module(getattr(models, name).__module__)
        assert name in module.__all__ and getattr(module, name) is getattr(models, name)
        assert registered in module.__all__ and timm.is_model(registered)
        assert all(hasattr(module, exported) for exported in module.__all__)


@pytest.mark.parametrize("name", NAMED)
def test_is_shown_as_if_it_were_written_out(name: str) -> None:
    function = getattr(models, name)
    _, model_class, keep_rate, drop_loc, img_size = NAMED[name]
    signature = inspect.signature(function)
    assert list(signature.parameters) == PARAMETERS
    defaults = [p.default for p in signature.parameters.values()]
    assert defaults == [keep_rate, True, drop_loc, img_size, 1000, False, inspect.Parameter.empty]
    assert signature.parameters["timm_kwargs"].kind is inspect.Parameter.VAR_KEYWORD
    assert get_type_hints(function)["return"] is model_class
    assert function.__name__ == function.__qualname__ == name
    assert function.__module__ == f"evit_ext.models.{name.split('_')[0]}"
    assert inspect.getdoc(function).startswith("Return ")
    assert pickle.loads(pickle.dumps(function)) is function


@pytest.mark.parametrize("name", NAMED)
def test_defaults_arrive(name: str) -> None:
    registered, model_class, keep_rate, drop_loc, img_size = NAMED[name]
    with torch.device("meta"):
        by_function = getattr(models, name)()
        by_timm = timm.create_model(registered)
    for model in (by_function, by_timm):
        assert type(model) is model_class
        depth = len(model.blocks)
        stages = {i: b for i, b in enumerate(model.blocks) if isinstance(b, ReorganizingBlock)}
        assert tuple(stages) == (drop_loc or (depth // 4, depth // 2, 3 * depth // 4))
        assert {(b.keep_rate, b.rule.fuse_token) for b in stages.values()} == {(keep_rate, True)}
        assert model.patch_embed.img_size == (img_size, img_size) and model.num_classes == 1000
        assert model.pos_embed.shape[1] == (img_size // 16) ** 2 + model.num_prefix_tokens


@pytest.mark.parametrize("name", ["deit_small_288", "deit_tiny_distilled", "lvvit_small"])
def test_arguments_arrive(name: str) -> None:
    with torch.device("meta"):
        by_position = getattr(models, name)(0.4, False, (1, 2), (32, 64), 3, False, embed_dim=24, num_heads=2)
    stages = [i for i, block in enumerate(by_position.blocks) if isinstance(block, ReorganizingBlock)]
    assert stages == [1, 2] and by_position.blocks[1].keep_rate == 0.4
    assert not by_position.blocks[1].rule.fuse_token
    assert by_position.patch_embed.img_size == (32, 64) and by_position.num_classes == 3
    with pytest.raises(TypeError, match=rf"{name}\(\) takes from 0 to 6 positional arguments but 7"):
        getattr(models, name)(0.4, False, (1, 2), 32, 3, False, 24)
    with pytest.raises(TypeError, match="no_such_argument"):
        getattr(models, name)(depth=1, drop_loc=[0], no_such_argument=1)
