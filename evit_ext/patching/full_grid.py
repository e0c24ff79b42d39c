"""Intermediate features of an EViT as full grids, for detection and segmentation heads."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from evit_ext._util.messages import shown
from evit_ext._util.overriding import Override
from evit_ext._util.wrappers import unwrapped
from evit_ext.patching.recording import TokenRecord, recording
from evit_ext.tokens.stage import Stage, find_stages

_FILLS = ("fused", "before", "zero")

#: The first parameters of timm's method.
_PARAMETERS = (
    "x",
    "indices",
    "return_prefix_tokens",
    "norm",
    "stop_early",
    "output_fmt",
    "intermediates_only",
)


class FullGridIntermediates(Override):
    """Overrides ``forward_intermediates`` of a timm model so that its features are full grids again.

    It has timm's arguments and return values: for each requested block, the features of all patches,
    [B, C, height, width] (NCHW) or [B, height * width, C] (NLC), put back in place by
    :func:`evit_ext.ops.restore_tokens`. The final features, returned unless ``intermediates_only``, are those
    of the remaining tokens.

    The additional argument ``fill`` chooses the value of a dropped patch:

    * "fused": that of the token it was fused into, at the requested block. The default if tokens are fused.
    * "before": its own value just before it was dropped. The default without fused tokens.
    * "zero": zeros.

    Raises:
        ValueError: `fill` is none of these, or is "fused" although tokens are not fused.
    """

    @staticmethod
    def fits(vit: nn.Module) -> bool:
        """Return whether `vit` has timm's ``forward_intermediates``."""
        method = getattr(vit, "forward_intermediates", None)
        if method is None:
            return False
        return tuple(inspect.signature(method).parameters)[: len(_PARAMETERS)] == _PARAMETERS

    def __call__(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        *,
        fill: str | None = None,
        **others: Any,
    ) -> Any:
        """Return the features of images `x` [B, channels, height, width]; see timm's, and above."""
        vit: Any = self.module
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NLC', got {shown(output_fmt)}")
        found = find_stages(vit)
        fill = _check_fill(fill, fused=all(stage.rule.fuses for stage in found))
        taken, _ = feature_take_indices(len(vit.blocks), indices)
        stages = [
            sum(isinstance(unwrapped(block), Stage) for block in vit.blocks[: index + 1])
            for index in sorted(taken)
        ]
        with recording(found, TokenRecord(keep_tokens=fill == "before", private=True)) as record:
            out = self.original()(
                x, indices, return_prefix_tokens, norm, stop_early, "NLC", intermediates_only, **others
            )
        norm_layer = vit.norm if norm else None
        grid = vit.patch_embed.dynamic_feat_size(tuple(x.shape[2:])) if output_fmt == "NCHW" else None

        def restore(features: list[Any]) -> list[Any]:
            restored = []
            for tokens, number in zip(features, stages, strict=True):
                with_prefix = isinstance(tokens, tuple)
                patches = _restore(tokens[0] if with_prefix else tokens, number, record, fill, norm_layer)
                if grid is not None:
                    patches = patches.transpose(1, 2).unflatten(2, grid).contiguous()
                restored.append((patches, tokens[1]) if with_prefix else patches)
            return restored

        if isinstance(out, dict):
            return {**out, "image_intermediates": restore(out["image_intermediates"])}
        if intermediates_only:
            return restore(out)
        return out[0], restore(out[1])


class FullGridHiddenStates(Override):
    """Overrides the encoder's forward of a Backbone of transformers, whose feature maps are full grids again.

    A Backbone makes its feature maps of the hidden states that its encoder returns. Those behind a stage are
    put back in place by :func:`evit_ext.ops.restore_tokens`: a dropped patch has the value of the token that
    it was fused into or, without fused tokens, its own value just before it was dropped.
    """

    @staticmethod
    def fits(vit: nn.Module) -> bool:
        """Return whether `vit` is such a Backbone."""
        named = any(cls.__name__.endswith("Backbone") for cls in type(vit).__mro__)
        return named and hasattr(getattr(vit, "encoder", None), "layer")

    def __call__(self, hidden_states: Tensor, *arguments: Any, **named: Any) -> Any:
        """Return the encoder's output for tokens [B, N, C]; see transformers'."""
        found = find_stages(self.module)
        fill = _check_fill(None, fused=all(stage.rule.fuses for stage in found))
        with recording(found, TokenRecord(keep_tokens=fill == "before", private=True)) as record:
            out = self.original()(hidden_states, *arguments, **named)
        if out.hidden_states is None:
            return out
        # The first is the input; the others are the layers' outputs.
        encoder: Any = self.module
        passed, numbers = 0, [0]
        for layer in encoder.layer:
            passed += isinstance(unwrapped(layer), Stage)
            numbers.append(passed)
        restored = []
        for tokens, number in zip(out.hidden_states, numbers, strict=True):
            if tokens is not None and number:
                prefix: Any = found[0].num_prefix_tokens
                patches = _restore(tokens[:, prefix:], number, record, fill, None)
                tokens = torch.cat([tokens[:, :prefix], patches], dim=1)
            restored.append(tokens)
        out.hidden_states = tuple(restored)
        return out


def _check_fill(fill: str | None, fused: bool) -> str:
    if fill is None:
        return "fused" if fused else "before"
    if fill not in _FILLS:
        raise ValueError(f"fill must be one of {', '.join(map(repr, _FILLS))}, got {shown(fill)}")
    if fill == "fused" and not fused:
        raise ValueError("fill='fused' needs a fused token, but the model drops patches")
    return fill


def _restore(
    patches: Tensor, num_stages: int, record: TokenRecord, fill: str, norm: nn.Module | None
) -> Tensor:
    """Return features of all patches [B, N - P, C], given those that remain after `num_stages` stages."""
    for stage in reversed(range(num_stages)):
        plan = record.trail.plan(stage)
        if plan.keeps_all:
            continue
        filling: str | Tensor = fill
        if fill == "before":
            before = record.tokens[stage]
            if patches.requires_grad and not before.requires_grad:
                raise RuntimeError(
                    "fill='before' has no gradient under reentrant gradient checkpointing: use the other "
                    "kind (timm.layers.set_reentrant_ckpt(False)), or another fill"
                )
            filling = (before if norm is None else norm(before))[:, -plan.num_patches :]
        patches = plan.restore(patches, filling)
    return patches
