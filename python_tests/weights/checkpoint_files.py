"""Checkpoint files with the layouts that were published, and small models to load them into."""

from __future__ import annotations

import argparse
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from evit_ext import models
from evit_ext.weights import load_checkpoint

MICRO: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 2}


# --- models, and files with the layouts that were published


def evit(**arguments: Any) -> Any:
    return models.deit_tiny(**{**MICRO, "drop_loc": None, "num_classes": 5, **arguments}).eval()


def lvvit(**arguments: Any) -> Any:
    arguments = {"stem_dim": 6, "skip_lam": 2.0, "num_classes": 5, **MICRO, **arguments}
    return models.lvvit_small(**arguments).eval()


def dynamicvit(**arguments: Any) -> Any:
    return models.dynamicvit_tiny(**{**MICRO, "drop_loc": None, "num_classes": 5, **arguments}).eval()


def vit(cls: type = VisionTransformer, **arguments: Any) -> Any:
    return cls(**{**MICRO, "num_classes": 5, **arguments}).eval()


def images(height: int = 32, width: int = 32) -> Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0))


def linear(name: str, out: int, inputs: int, bias: bool = True) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": (out, inputs)}
    return {**shapes, f"{name}.bias": (out,)} if bias else shapes


def norm(name: str, channels: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (channels,), f"{name}.bias": (channels,)}


def blocks(depth: int = 4, c: int = 24, mlp: int = 96, qkv_bias: bool = True) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for i in range(depth):
        shapes |= norm(f"blocks.{i}.norm1", c) | linear(f"blocks.{i}.attn.qkv", 3 * c, c, qkv_bias)
        shapes |= linear(f"blocks.{i}.attn.proj", c, c) | norm(f"blocks.{i}.norm2", c)
        shapes |= linear(f"blocks.{i}.mlp.fc1", mlp, c) | linear(f"blocks.{i}.mlp.fc2", c, mlp)
    return shapes


def draw(shapes: dict[str, tuple[int, ...]], seed: int = 7) -> OrderedDict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return OrderedDict(
        (key, torch.randn(shape, generator=generator) * 0.3 if shape else torch.tensor(100))
        for key, shape in shapes.items()
    )


def deit_file(classes: int = 5, tokens: int = 17, channels: int = 3, **options: Any) -> dict[str, Tensor]:
    """Weights under the names that DeiT's and EViT's published files have, those of timm 0.4.12."""
    c = options.get("c", 24)
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, c),
        "pos_embed": (1, tokens, c),
        "patch_embed.proj.weight": (c, channels, 8, 8),
        "patch_embed.proj.bias": (c,),
    }
    return draw(shapes | blocks(**options) | norm("norm", c) | linear("head", classes, c))


def distilled_file(classes: int = 5) -> dict[str, Tensor]:
    added = draw({"dist_token": (1, 1, 24), **linear("head_dist", classes, 24)}, seed=8)
    return {**deit_file(classes, tokens=18), **added}


def lvvit_file(classes: int = 5, tokens: int = 17) -> dict[str, Tensor]:
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, 24),
        "pos_embed": (1, tokens, 24),
        "patch_embed.proj.weight": (24, 6, 4, 4),
        "patch_embed.proj.bias": (24,),
    }
    for i, kernel in ((1, (6, 3, 7, 7)), (2, (6, 6, 3, 3)), (3, (6, 6, 3, 3))):
        shapes[f"patch_embed.conv{i}.weight"] = kernel
        shapes |= {f"patch_embed.bn{i}.{k}": (6,) for k in ("weight", "bias", "running_mean", "running_var")}
        shapes[f"patch_embed.bn{i}.num_batches_tracked"] = ()
    shapes |= blocks(mlp=72, qkv_bias=False) | norm("norm", 24)
    return draw(shapes | linear("head", classes, 24) | linear("aux_head", classes, 24))


def dynamicvit_file() -> dict[str, Tensor]:
    shapes: dict[str, tuple[int, ...]] = {}
    for i in range(3):
        name = f"score_predictor.{i}"
        shapes |= norm(f"{name}.in_conv.0", 24) | linear(f"{name}.in_conv.1", 24, 24)
        for number, out, inputs in ((0, 12, 24), (2, 6, 12), (4, 2, 6)):
            shapes |= linear(f"{name}.out_conv.{number}", out, inputs)
    return {**deit_file(), **draw(shapes, seed=9)}


def evit_arguments() -> argparse.Namespace:
    """Some of what the published EViT's main.py saves as "args"."""
    return argparse.Namespace(
        model="deit_small_patch16_shrink_base",
        base_keep_rate=0.7,
        drop_loc="(3, 6, 9)",
        fuse_token=True,
        opt_betas=None,
        lr_noise=[0.1, 0.9],
    )


def training_file() -> dict[str, Any]:
    """What DeiT's and EViT's training code saves each epoch."""
    state = deit_file()
    parameter = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter])
    parameter.sum().backward()
    optimizer.step()
    return {
        "model": state,
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": {"base_values": [np.float64(5e-4)], "t_in_epochs": True},
        "epoch": 29,
        "model_ema": {key: value + 1 for key, value in state.items()},
        "scaler": {"scale": 65536.0, "growth_factor": 2.0, "_growth_tracker": 0},
        "args": evit_arguments(),
        "max_accuracy": np.float64(79.5),
        "confusion": np.arange(6).reshape(2, 3),
        "output_dir": Path("runs"),
    }


def saved(folder: Path, content: Any, name: str = "checkpoint.pth", **options: Any) -> Path:
    torch.save(content, folder / name, **options)
    return folder / name


def assert_loaded(model: nn.Module, state: dict[str, Tensor], *others: str) -> None:
    """Check that `model` has exactly the weights of `state`, but for keys that begin with `others`."""
    own = model.state_dict()
    assert {k for k in own if not k.startswith(others)} == {k for k in state if not k.startswith(others)}
    for key, value in own.items():
        if not key.startswith(others):
            assert torch.equal(value, state[key].to(value)), key


def refused(model: nn.Module, file: Any, error: type[BaseException] = ValueError, **options: Any) -> str:
    """Load what must be refused; check that nothing in the model has changed, return what was said."""
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(error) as caught:
        load_checkpoint(model, file, progress=False, **options)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    return str(caught.value)


def truncated_safetensors(path: Path) -> None:
    save_file(deit_file(), path)
    path.write_bytes(path.read_bytes()[:-5000])
