"""An oracle: a frozen ViT that decides which patches another one keeps, as in the EViT paper's experiment."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from timm.utils.model import unwrap_model
from torch import Tensor, nn

from evit_ext import ops
from evit_ext._util.wrappers import unwrapped
from evit_ext.ops import checks
from evit_ext.patching.applying import apply
from evit_ext.patching.block import AdoptedBlock
from evit_ext.patching.families import locate
from evit_ext.patching.full_grid import FullGridIntermediates
from evit_ext.patching.recording import TokenRecord, graph_task, recording
from evit_ext.tokens.plan import Plan
from evit_ext.tokens.stage import stages_of
from evit_ext.tokens.trail import TokenTrail


class Oracle(nn.Module):
    """A frozen ViT that sees all patches, and tells an EViT which ones to keep.

    Liang et al. (ICLR 2022) guide an EViT during training with the attention of a trained ViT: at each
    reorganising block the oracle's class token, which has seen all tokens, chooses instead of the EViT's.

    Args:
        vit: a trained model that :func:`evit_ext.apply` supports. It is copied; the copy is frozen and stays
            in eval mode.
        drop_loc: numbers of the blocks whose attention is used, ascending, from 0; by default those at the
            quarters of the depth. There must be as many as the EViT has reorganising blocks.

    Raises:
        TypeError, ValueError: as :func:`evit_ext.apply`.

    Example:
        >>> oracle = evit_ext.Oracle(vit)
        >>> student = models.deit_small(keep_rate=0.7)
        >>> oracle.initialize(student)
        >>> with oracle.guide(student):
        ...     loss(student(images), labels).backward()
    """

    def __init__(self, vit: nn.Module, drop_loc: Sequence[int] | None = None) -> None:
        super().__init__()
        self.vit: Any = apply(copy.deepcopy(vit), 1.0, drop_loc)
        self.vit.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Oracle:
        """Stay in eval mode: an oracle does not learn."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor, **arguments: Any) -> list[Tensor]:
        """Return the class token's score of each patch, stage by stage.

        Args:
            images: [B, channels, height, width], dtype and device of the oracle's weights.
            arguments: further arguments of its forward. In a model of transformers with a text model, only
                the vision model runs.

        Returns:
            For each stage, the scores [B, patches] of all patches at that block, float32 (float64 for
            float64).
        """
        located = locate(self.vit)
        assert located is not None
        vit = located.vit
        weight = next(vit.parameters())
        if images.dtype != weight.dtype and not checks.autocast_enabled(images.device.type):
            raise ValueError(f"the oracle is {weight.dtype}, the images are {images.dtype}: oracle.to(dtype)")
        stages = stages_of(vit)
        with recording(stages, TokenRecord(private=True)) as record:
            if FullGridIntermediates.fits(vit):
                # Stops after the last stage: nobody needs the rest.
                last = max(i for i, block in enumerate(located.blocks) if unwrapped(block) in stages)
                vit.forward_intermediates(
                    images, indices=[last], stop_early=True, output_fmt="NLC", intermediates_only=True
                )
            else:
                vit(images, **arguments)
        return record.scores

    def initialize(self, student: nn.Module) -> None:
        """Give `student` the oracle's weights.

        Raises:
            ValueError: they do not fit; the student is left as it was.
        """
        student = unwrap_model(student)
        weights, own = self.vit.state_dict(), student.state_dict()
        wrong = [
            f"{name}: {_shape(weights, name)} in the oracle, {_shape(own, name)} in the student"
            for name in {**weights, **own}
            if _shape(weights, name) != _shape(own, name)
        ]
        if wrong:
            more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            raise ValueError(f"the oracle's weights do not fit the student: {'; '.join(wrong[:3])}{more}")
        student.load_state_dict(weights)

    @contextmanager
    def guide(self, student: nn.Module) -> Iterator[None]:
        """Let the oracle choose the patches that `student` keeps, in every forward while the context is open.

        The oracle's scores, which carry no gradient, also weight the student's fused tokens. At later stages,
        where the student has only some of the patches left, each keeps the score that the oracle gives it
        there. A fused token gets the mean score of the patches that went into it, because the class token
        attends to it as to one token.

        Student and oracle must have the same patches: the same number, in the same order. Records
        (:func:`evit_ext.record_tokens`) contain the oracle's scores.

        Args:
            student: a model that :func:`evit_ext.apply` changed, with as many reorganising blocks as the
                oracle has.

        Raises:
            ValueError: the student does not reorganise tokens, has another number of stages or (in its
                forward) of patches, or is guided already.
            RuntimeError: in the backward, with gradient checkpointing, if another forward came in between.

        The oracle runs when `student` itself is called; meanwhile the student's other methods, such as
        ``forward_features``, and its parts raise a ValueError. Only one thread at a time may run the student.
        """
        blocks = stages_of(student)
        if not any(isinstance(block, AdoptedBlock) for block in blocks):
            raise ValueError(
                f"{type(student).__name__} chooses its patches by the rule {blocks[0].rule.name}, in which "
                "an oracle has no say: expected a model that evit_ext.apply changed"
            )
        stages = len(stages_of(self.vit))
        if len(blocks) != stages:
            raise ValueError(
                f"the oracle has {stages} stages, the student {len(blocks)}: give Oracle a drop_loc of as "
                "many blocks"
            )
        if mute := next((block for block in blocks if "scores" not in block.rule.wants()), None):
            raise ValueError(
                f"the rule {mute.rule.name} of the student does not rank patches by scores, which an oracle "
                "would give it"
            )
        if any(block.guidance is not None for block in blocks):
            raise ValueError("the student is guided by an oracle already")
        guidance = Guidance()

        def ask(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            images, others = _images(arguments, named)
            guidance.begin(self(images, **others))

        def end(module: nn.Module, arguments: Any, output: Any) -> None:
            guidance.end()

        handles = (
            student.register_forward_pre_hook(ask, with_kwargs=True),
            student.register_forward_hook(end, always_call=True),
        )
        for block in blocks:
            block.guidance = guidance
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for block in blocks:
                block.guidance = None


def _shape(state: dict[str, Tensor], name: str) -> str:
    return str(tuple(state[name].shape)) if name in state else "none"


def _images(arguments: tuple[Any, ...], named: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """Return the images that a model is called with, and what else the oracle has to know of them."""
    others = {name: named[name] for name in ("interpolate_pos_encoding",) if name in named}
    if "pixel_values" in named:  # transformers
        return named["pixel_values"], others
    values = (*arguments, *named.values())
    images = next((v for v in values if isinstance(v, Tensor) and v.dim() == 4), None)
    if images is None:
        raise ValueError("the student was called without images [B, channels, height, width] for the oracle")
    return images, others


class Guidance:
    """What an oracle says of the patches of one forward, and which of them the student's tokens are."""

    def __init__(self) -> None:
        self._scores: list[Tensor] = []
        self._trail = TokenTrail()
        self._inputs: dict[int, int] = {}
        self._running = False
        self._graph_task = -1

    def begin(self, scores: list[Tensor]) -> None:
        """Begin a forward for which the oracle says `scores`, [B, patches] a stage."""
        self._scores, self._trail, self._inputs = scores, TokenTrail(), {}
        self._running, self._graph_task = True, graph_task()

    def end(self) -> None:
        """End the forward."""
        self._running = False

    def scores(self, stage: int, x: Tensor, num_patches: int) -> Tensor:
        """Return the scores [B, num_patches] of the patch tokens in `x` [B, N, C] that enter a stage."""
        again = graph_task() != self._graph_task
        if not self._scores or not (self._running or again):
            raise ValueError("the oracle was not asked: call the whole model, not a part of it")
        # Gradient checkpointing runs a block again on the same input. If that input is not the last
        # forward's, the patches of its forward are no longer known.
        if again:
            if self._inputs.get(stage) != x.data_ptr():
                raise RuntimeError(
                    "with an oracle and gradient checkpointing, every forward needs its backward before the "
                    "next forward"
                )
        elif not torch.compiler.is_compiling():
            self._inputs[stage] = x.data_ptr()
        scores = self._scores[stage]
        places = self._trail.places(stage)
        if places is None:
            if scores.shape != (x.shape[0], num_patches):
                raise ValueError(
                    f"the oracle sees {tuple(scores.shape)} patches [B, N], the student "
                    f"{(x.shape[0], num_patches)}"
                )
            return scores
        # A row more, for patches that no token stands for. Sums in the order of the patches.
        both = torch.stack([scores, torch.ones_like(scores)], dim=2)
        sums = ops.scatter_tokens(both, torch.where(places < 0, num_patches, places), num_patches + 1)
        return sums[:, :-1, 0] / sums[:, :-1, 1]

    def add(self, stage: int, plan: Plan) -> None:
        """Add a stage, as :meth:`TokenTrail.add`."""
        self._trail.add(stage, plan)
