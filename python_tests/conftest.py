"""Fixtures shared by the tests: devices, small models and the golden files of the published code."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from inspect import signature
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer

GOLDEN = Path(__file__).parent / "golden"

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each device of this machine in turn."""
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Start every test with the same random numbers, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Compute with one thread: models this small lose far more to waiting threads than they gain."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def weights() -> ModuleType:
    """The module that draws the weights, images and projections the golden files were made with."""
    spec = importlib.util.spec_from_file_location("golden_weights", GOLDEN / "weights.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def golden() -> Any:
    """A function from a golden file's name to its arrays as tensors."""

    def load(name: str) -> dict[str, torch.Tensor]:
        with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as arrays:
            return {key: torch.from_numpy(arrays[key]) for key in arrays.files}

    return load


@pytest.fixture
def small_vit() -> Any:
    """A function that builds a timm VisionTransformer with 4 blocks and 16 patches; arguments override.

    Its weights are large enough that every token tells on the logits, which timm's initial ones are not.
    """

    def build(cls: type = VisionTransformer, dtype: torch.dtype = torch.float32, **arguments: Any) -> Any:
        defaults = {
            "img_size": 32,
            "patch_size": 8,
            "embed_dim": 24,
            "depth": 4,
            "num_heads": 2,
            "num_classes": 5,
        }
        model = cls(**{**defaults, **arguments})
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                torch.nn.init.normal_(parameter, mean=1.0 if name.endswith("weight") else 0.0, std=0.1)
            else:
                fan_in = parameter[0].numel() if parameter.shape[0] > 1 else 4
                torch.nn.init.normal_(parameter, std=1.5 * fan_in**-0.5)
        return model.to(dtype).eval()

    return build


#: Kinds of vision transformers that are supported, by what they add to the plain one.
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "registers": {"reg_tokens": 3},
    "dinov2": {"reg_tokens": 2, "no_embed_class": True, "init_values": 0.5},
    "qk_norm": {"qk_norm": True, "init_values": 0.7},
    "scale_norm": {"scale_attn_norm": True, "scale_mlp_norm": True},
    "clip": {"pre_norm": True, "qkv_bias": False},
    "average_pool": {"global_pool": "avg"},
    "attention_pool": {"global_pool": "map"},
    "distilled": {"cls": VisionTransformerDistilled},
    "gated": {"gated": True},  # set below: timm's VisionTransformer does not pass it on
    "dynamic": {"dynamic_img_size": True},
}


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest, small_vit: Any) -> Any:
    """A function that builds the same small model of one kind each time; arguments override."""

    def build(**arguments: Any) -> Any:
        torch.manual_seed(1)
        arguments = {**VARIANTS[request.param], **arguments}
        gated = arguments.pop("gated", False)
        if not set(arguments) - {"cls", "dtype"} <= set(signature(VisionTransformer).parameters):
            pytest.skip("this timm is too old for it")
        vit = small_vit(**arguments)
        if gated:
            if not hasattr(vit.blocks[0].attn, "gate"):
                pytest.skip("this timm is too old for it")
            for block in vit.blocks:
                block.attn.gate = torch.nn.Linear(24, 24).to(vit.cls_token.dtype)
        return vit

    return build
