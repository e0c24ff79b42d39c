"""Backbones of transformers, whose feature maps are full grids although tokens are dropped."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from huggingface_models import SIZES, images, transformers
from torch import Tensor

import evit_ext

#: For each Backbone: its configuration, and the number of tokens in front of the patches.
BACKBONES: dict[str, tuple[dict[str, Any], int]] = {
    "Dinov2": ({"mlp_ratio": 2}, 1),
    "Dinov2WithRegisters": ({"mlp_ratio": 2, "num_register_tokens": 3}, 4),
}


def build(name: str, dtype: torch.dtype = torch.float32, **more: Any) -> Any:
    arguments = {**SIZES, **BACKBONES[name][0], "out_indices": [0, 1, 2, 3, 4], **more}
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**arguments)
    model = getattr(transformers, f"{name}Backbone")(config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.3, generator=generator)
    return model.to(dtype).eval()


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("fuse", [True, False])
def test_feature_maps_are_full_grids(name: str, fuse: bool) -> None:
    model, prefix = build(name, torch.float64), BACKBONES[name][1]
    x = images(2, torch.float64)
    with torch.no_grad():
        unchanged = model(x).feature_maps
    evit_ext.apply(model, keep_rate=(0.6, 0.5), drop_loc=(1, 2), fuse_token=fuse)
    outputs: list[Tensor] = []
    for layer in model.encoder.layer:
        layer.register_forward_hook(lambda module, args, out: outputs.append(out))
    with torch.no_grad(), evit_ext.record_tokens(model) as record:
        maps = model(x).feature_maps
    assert [tuple(one.shape) for one in maps] == [(2, 24, 4, 4)] * 5
    # Embeddings and the first layer are before the first stage.
    assert torch.equal(maps[0], unchanged[0])
    torch.testing.assert_close(maps[1], unchanged[1], rtol=1e-9, atol=1e-9)
    first, second = record.kept
    assert (first.shape[1], second.shape[1]) == (10, 6 if fuse else 5)
    for stage, tokens, found in (
        (0, outputs[1], maps[2]),
        (1, outputs[2], maps[3]),
        (1, outputs[3], maps[4]),
    ):
        tokens = model.layernorm(tokens)[:, prefix:]
        for b in range(2):
            grid = found[b].flatten(1).T
            kept = record.kept[stage][b].tolist()
            for patch in range(16):
                if patch in kept:
                    expected = tokens[b, kept.index(patch)]
                elif not fuse:
                    continue
                elif stage == 1 and -1 in kept and patch not in first[b].tolist():
                    expected = tokens[b, kept.index(-1)]  # fused at the first stage, kept at the second
                else:
                    expected = tokens[b, -1]
                torch.testing.assert_close(grid[patch], expected, rtol=1e-9, atol=1e-9)
            if not fuse:  # what they were before they were dropped, of a size like that of others
                assert (grid.abs().sum(dim=1) > 1).all()


@pytest.mark.parametrize("name", BACKBONES)
def test_keep_rate_1_and_remove(name: str) -> None:
    model = build(name)
    before = set(vars(model.encoder))
    with torch.no_grad():
        expected = model(images()).feature_maps
        evit_ext.apply(model, keep_rate=1)
        assert all(map(torch.equal, model(images()).feature_maps, expected))
        evit_ext.set_keep_rate(model, 0.5)
        assert not torch.equal(model(images()).feature_maps[-1], expected[-1])
        selected = model(images(), output_hidden_states=True).hidden_states
        assert selected[1].shape == selected[-1].shape == (3, 16 + BACKBONES[name][1], 24)
        evit_ext.remove(model)
        assert all(map(torch.equal, model(images()).feature_maps, expected))
    assert set(vars(model.encoder)) == before


@pytest.mark.parametrize("name", BACKBONES)
def test_subclasses_have_full_grids_too(name: str) -> None:
    """Whatever they are called: a Backbone is found by the classes it is made from."""
    model, other = build(name), build(name)
    cls = type(model)
    between = type("Between", (cls,), {"forward": lambda *a, **named: cls.forward(*a, **named)})
    other.__class__ = type("Features", (between,), {})
    for one in (model, other):
        evit_ext.apply(one, keep_rate=0.5)
    with torch.no_grad():
        expected = model(images()).feature_maps
        found = other(images()).feature_maps
    assert [tuple(one.shape) for one in found] == [(3, 24, 4, 4)] * 5
    assert all(map(torch.equal, found, expected))
    evit_ext.remove(other)
    with torch.no_grad():
        assert all(map(torch.equal, other(images()).feature_maps, build(name)(images()).feature_maps))


def test_other_models_are_no_backbones() -> None:
    """Not DINOv2 itself, whose hidden states stay those of the remaining tokens, whatever its name."""
    torch.manual_seed(0)
    config = transformers.Dinov2Config(**SIZES, mlp_ratio=2)
    model = transformers.Dinov2Model(config).eval()
    model.__class__ = type("NoBackboneAtAll", (transformers.Dinov2Model,), {})
    evit_ext.apply(model, keep_rate=0.5)
    assert "forward" not in vars(model.encoder)
    with torch.no_grad():
        states = model(images(), output_hidden_states=True).hidden_states
    assert states[0].shape[1] == 17 and states[-1].shape[1] < 17


def test_flat_feature_maps_of_one_layer() -> None:
    model = build("Dinov2", reshape_hidden_states=False, apply_layernorm=False, out_indices=[4])
    evit_ext.apply(model, keep_rate=0.5)
    with torch.no_grad():
        (found,) = model(images()).feature_maps
    assert found.shape == (3, 17, 24)


def test_trains() -> None:
    model = build("Dinov2")
    evit_ext.apply(model, keep_rate=0.5)
    model.train()
    sum(one.square().mean() for one in model(images()).feature_maps).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    assert model.encoder.layer[0].attention.q_proj.weight.grad.abs().sum() > 0
