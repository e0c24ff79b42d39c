"""A model of transformers as an EViT, slowly."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from huggingface_models import LINES, SIZES, output
from slow_tome import Groups, log_sizes, merge
from torch import Tensor

from evit_ext.patching import families


class Slow:
    """The model as an EViT, slowly: its own forward, but that each layer is computed here.

    Attention maps are formed, patches are selected one image at a time and in the order of their scores.
    """

    def __init__(
        self, line: str, model: Any, rates: Sequence[float], drop_loc: Sequence[int], fuse: bool
    ) -> None:
        self.prefix, self.class_token = LINES[line][3:]
        self.model = model
        self.settings = dict(zip(drop_loc, rates, strict=True))
        self.fuse = fuse
        self.kept: list[list[list[int]]] = []
        self.patches: list[list[int]] = []

    def __call__(self, x: Tensor) -> Tensor:
        layers = families.locate(self.model).blocks
        assert layers is not None
        for number, layer in enumerate(layers):
            layer.forward = self.layer(number, layer)
        try:
            self.kept, self.patches = [], []
            return output(self.model, x)
        finally:
            for layer in layers:
                del layer.forward

    def layer(self, number: int, layer: Any) -> Any:
        def part(*names: str) -> Any:
            return next(getattr(layer, name) for name in names if hasattr(layer, name))

        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if not self.patches:
                self.patches = [list(range(x.shape[1] - self.prefix)) for _ in x]
            attention = part("attention", "self_attn")
            normed = part("layernorm_before", "norm1", "layer_norm1")(x)
            heads = SIZES["num_attention_heads"]
            q, k, v = (
                p(normed).reshape(len(x), x.shape[1], heads, -1).transpose(1, 2)
                for p in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            weights = (q @ k.transpose(2, 3) / math.sqrt(q.shape[3]) + self.bias(number)).softmax(dim=-1)
            attended = (weights @ v).transpose(1, 2).reshape(len(x), x.shape[1], -1)
            projection = attention.o_proj if hasattr(attention, "o_proj") else attention.out_proj
            attended = projection(attended)
            x = x + (layer.layer_scale1(attended) if hasattr(layer, "layer_scale1") else attended)
            if number in self.settings:
                x = self.reduce(number, x, weights, k)
            out = layer.mlp(part("layernorm_after", "norm2", "layer_norm2")(x))
            return x + (layer.layer_scale2(out) if hasattr(layer, "layer_scale2") else out)

        return forward

    def bias(self, number: int) -> Tensor | float:
        """Return what layer `number` adds to its logits."""
        return 0.0

    def reduce(self, number: int, x: Tensor, weights: Tensor, keys: Tensor) -> Tensor:
        """Return the tokens that are left of `x`, given the map [B, H, N, N] and the keys [B, H, N, D]."""
        scores = weights[:, :, 0] if self.class_token else weights.mean(dim=2)
        return self.reorganize(x, scores.mean(dim=1)[:, self.prefix :], self.settings[number])

    def reorganize(self, x: Tensor, scores: Tensor, rate: float) -> Tensor:
        rows, stage = [], []
        for b in range(len(x)):
            patches = self.patches[b]
            keep = math.ceil(rate * len(patches))
            order = sorted(range(len(patches)), key=lambda j: -float(scores[b, j]))
            chosen, others = order[:keep], order[keep:]
            row = [x[b, : self.prefix], x[b, [self.prefix + j for j in chosen]]]
            left = [patches[j] for j in chosen]
            stage.append(sorted(left))
            if self.fuse and others:
                row.append(sum(scores[b, j] * x[b, self.prefix + j] for j in others)[None])
                left.append(-1)
            self.patches[b] = left
            rows.append(torch.cat(row))
        self.kept.append(stage)
        return torch.stack(rows)


class SlowToMe(Slow):
    """The model with ToMe's merging, `merged` tokens at each block of `drop_loc`."""

    def __init__(self, line: str, model: Any, merged: Sequence[int], drop_loc: Sequence[int]) -> None:
        super().__init__(line, model, (1.0,) * len(drop_loc), drop_loc, fuse=False)
        self.merged = dict(zip(drop_loc, merged, strict=True))
        self.stages: list[list[Groups]] = []

    def bias(self, number: int) -> Tensor | float:
        if number == 0:
            self.stages = []
        return log_sizes(self.stages[-1], self.prefix, torch.empty(0).double()) if self.stages else 0.0

    def reduce(self, number: int, x: Tensor, weights: Tensor, keys: Tensor) -> Tensor:
        before = self.stages[-1] if self.stages else [[[i] for i in image] for image in self.patches]
        rows, left = zip(
            *(
                merge(x[b], keys[b].mean(dim=0), before[b], self.prefix, self.merged[number])
                for b in range(len(x))
            ),
            strict=True,
        )
        self.stages.append(list(left))
        return torch.stack(rows)
