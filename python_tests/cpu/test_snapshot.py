"""Snapshots of modules: whatever is changed, they no longer hold."""

from __future__ import annotations

import gc
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from evit_ext._util.compiled import Snapshot


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.1), nn.GELU())
        self.scale = 0.5

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) * self.scale


class Other(nn.Parameter):
    """As of libraries that quantise."""


def snapshot(module: nn.Module) -> Snapshot:
    return Snapshot(list(module.modules()), [])


CHANGES: dict[str, Callable[[Any], Any]] = {
    "a number": lambda layers: setattr(layers, "scale", 0.25),
    "a new attribute": lambda layers: setattr(layers, "more", 1),
    "a deleted attribute": lambda layers: delattr(layers, "scale"),
    "a renamed attribute": lambda layers: layers.__dict__.update(other=layers.__dict__.pop("scale")),
    "the mode": lambda layers: layers.inner[1].eval(),
    "a hook": lambda layers: layers.inner[0].register_forward_hook(lambda *_: None),
    "a hook before": lambda layers: layers.inner[2].register_forward_pre_hook(lambda *_: None),
    "a backward hook": lambda layers: layers.inner[0].register_full_backward_hook(lambda *_: None),
    "other hooks": lambda layers: setattr(layers.inner[0], "_forward_hooks", OrderedDict()),
    "a forward": lambda layers: setattr(layers.inner[0], "forward", lambda x: x),
    "a class": lambda layers: setattr(layers.inner[1], "__class__", nn.AlphaDropout),
    "a submodule": lambda layers: layers.inner.__setitem__(2, nn.GELU()),
    "one submodule more": lambda layers: layers.inner.append(nn.GELU()),
    "a parameter": lambda layers: setattr(layers.inner[0], "weight", nn.Parameter(torch.ones(3, 4))),
    "no bias": lambda layers: setattr(layers.inner[0], "bias", None),
    "a dtype": lambda layers: layers.double(),
    "a layout": lambda layers: setattr(layers.inner[0].weight, "data", torch.ones(4, 3).t()),
    "a shape": lambda layers: setattr(layers.inner[0].weight, "data", torch.ones(2, 4)),
    "a class of parameters": lambda layers: setattr(layers.inner[0].weight, "__class__", Other),
    "a device": lambda layers: layers.to("meta"),
    "a buffer": lambda layers: layers.register_buffer("mean", torch.zeros(1)),
    "a dictionary": lambda layers: setattr(layers, "__dict__", dict(layers.__dict__)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_seen(change: str) -> None:
    layers = Layers()
    seen = snapshot(layers)
    assert seen.holds() and seen.holds()
    CHANGES[change](layers)
    assert not seen.holds()


def test_a_class_that_computes_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = snapshot(Layers())
    with monkeypatch.context() as patched:
        patched.setattr(nn.GELU, "forward", lambda self, x: x)
        assert not seen.holds()
    assert seen.holds()


def test_other_dictionaries() -> None:
    layers = Layers()
    seen = Snapshot([], [layers._modules])
    assert seen.holds()
    layers.inner = nn.Sequential()
    assert not seen.holds()


def test_values_are_not_compared() -> None:
    layers = Layers()
    seen = snapshot(layers)
    with torch.no_grad():
        layers.inner[0].weight.add_(1)
    layers(torch.ones(4)).sum().backward()
    layers.load_state_dict(Layers().state_dict())
    assert seen.holds()


def test_what_is_gone_is_let_go() -> None:
    layers = Layers()
    seen, weight = snapshot(layers), weakref.ref(layers.inner[0].weight)
    del layers
    gc.collect()
    assert seen.holds() and weight() is not None
    del seen
    gc.collect()
    assert weight() is None


def test_what_holds_its_holder_is_let_go() -> None:
    layers: Any = Layers()
    layers.owner = [layers]
    layers.seen = snapshot(layers.inner)
    layers.inner.owner = [layers]
    layers.seen = snapshot(layers.inner)
    gone = weakref.ref(layers)
    del layers
    gc.collect()
    assert gone() is None
