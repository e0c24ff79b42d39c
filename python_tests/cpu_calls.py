"""How often a model calls the CPU's kernel for attention and oneDNN's linear layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from evit_ext import ops
from evit_ext.cpu import forward as cpu_forward
from evit_ext.cpu import patch_projection
from evit_ext.ops import library

Build = Callable[..., Any]


class Calls:
    """Counts the calls of the attention kernel and of oneDNN's linear layers in blocks.

    `sums` are the linear layers that add to the tokens, as those of whole blocks do.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.attention = self.linear = self.gelu = self.sums = 0
        attention, linear = ops.attention_with_scores, cpu_forward._linear_pointwise
        linear_binary = cpu_forward._linear_binary

        def count_attention(*arguments: Any, **named: Any) -> Any:
            self.attention += 1
            return attention(*arguments, **named)

        def count_linear(x: Tensor, weight: Tensor, bias: Tensor, what: str, *rest: Any) -> Tensor:
            self.linear += 1
            self.gelu += what == "gelu"
            return linear(x, weight, bias, what, *rest)

        def count_binary(*arguments: Any) -> Tensor:
            self.linear += 1
            self.sums += 1
            return linear_binary(*arguments)

        def project(x: Tensor, by: cpu_forward.Operands) -> Tensor:
            return linear(x, *by, "none", [], "")

        # What is counted is what runs on a processor without tiles.
        monkeypatch.setattr(library, "TILED", frozenset())
        # The projection of the patches is no layer of a block.
        monkeypatch.setattr(patch_projection, "product", project)
        monkeypatch.setattr(ops, "attention_with_scores", count_attention)
        monkeypatch.setattr(cpu_forward, "_linear_pointwise", count_linear)
        monkeypatch.setattr(cpu_forward, "_linear_binary", count_binary)

    def during(self, model: nn.Module, images: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
        """Return what `model` computes without gradients, and the calls that took."""
        self.attention = self.linear = self.gelu = self.sums = 0
        with torch.no_grad():
            out = model(images)
        return out, (self.attention, self.linear, self.gelu)


def images(dtype: torch.dtype = torch.float32, batch: int = 3) -> Tensor:
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(0)).to(dtype)


def watch_class(monkeypatch: pytest.MonkeyPatch, kind: Any, seen: list[str]) -> None:
    """Replace the forward of a class by one that notes its name in `seen` and then does the same."""
    original = kind.forward

    def forward(self: Any, *arguments: Any, **named: Any) -> Any:
        seen.append(kind.__name__)
        return original(self, *arguments, **named)

    monkeypatch.setattr(kind, "forward", forward)
    seen.clear()


#: A block has an attention, four linear layers, one of them with a GELU; the model has four blocks.
FAST = (4, 16, 4)


def compiling_is_exporting() -> bool:
    """Whether the compiler says that it exports, as torch 2.10's does: then our kernels stand back."""

    def says_so(x: Tensor) -> Tensor:
        return x + 1 if torch.compiler.is_exporting() else x

    return bool(torch.compile(says_so, backend="eager")(torch.zeros(1)))
