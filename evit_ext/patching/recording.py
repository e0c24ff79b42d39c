"""Which patches each stage of a model kept, and with what scores."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from evit_ext import ops
from evit_ext._util.messages import shown
from evit_ext.tokens.plan import Plan
from evit_ext.tokens.stage import Stage, stages_of
from evit_ext.tokens.trail import TokenTrail


class _Forward(NamedTuple):
    """What one forward did; `tokens` and `scores` by stage."""

    trail: TokenTrail
    tokens: dict[int, Tensor]
    scores: dict[int, Tensor]


class TokenRecord:
    """What :func:`record_tokens` saw in the last forward, a stage for each reorganising block.

    Args:
        keep_tokens: keep the tokens that stages chose from, too, with their gradient, in :attr:`tokens`.
        private: record only forwards of this thread, and those on meta tensors too.
    """

    def __init__(self, keep_tokens: bool = False, private: bool = False) -> None:
        self.keep_tokens = keep_tokens
        self._private = private
        self._thread = 0 if torch.compiler.is_compiling() else threading.get_ident()
        self._graph_task = graph_task()
        #: What this record tells of. Another thread may replace it at any time: read it once.
        self._shown = _Forward(TokenTrail(), {}, {})
        #: The last forward of each thread.
        self._forwards: dict[int, _Forward] = {}

    @property
    def trail(self) -> TokenTrail:
        """The stages of the forward."""
        return self._shown.trail

    @property
    def tokens(self) -> dict[int, Tensor]:
        """For each stage, the tokens [B, N, C] that it chose from, if `keep_tokens`."""
        return self._shown.tokens

    @property
    def kept(self) -> list[Tensor]:
        """For each stage, the patches it kept: int64 [B, K], numbers in the original grid, row by row.

        In ascending order, except that -1, which stands for a fused token of an earlier stage, comes last.
        """
        trail = self.trail
        return [trail.kept(stage) for stage in trail.stages]

    @property
    def scores(self) -> list[Tensor]:
        """For each stage, the scores [B, N - P] of the patch tokens that entered it.

        They are in the order of the tokens: at the first stage all patches, at a later one ``kept`` of the
        stage before followed by its fused token. float32, float64 for float64 models. Of a DynamicViT, the
        log-probabilities of being kept, in the dtype that the model computes in.

        Raises:
            ValueError: the model's rule does not rank patches.
        """
        trail, _, scores = self._shown
        stages = trail.stages
        if missing := [stage for stage in stages if stage not in scores]:
            raise ValueError(f"stage {missing[0]} has no scores: its rule does not rank patches")
        return [scores[stage] for stage in stages]

    def restore(
        self,
        tokens: Tensor,
        num_stages: int | None = None,
        fill: str | None = None,
        num_prefix_tokens: int = 0,
    ) -> Tensor:
        """Put tokens of the recorded forward back on the grid, such as features that a hook saw.

        Args:
            tokens: [B, P + M, C] with the M patch tokens that leave a stage, of any block behind it.
            num_stages: how many stages the tokens went through; by default all that were recorded. 0 is for
                tokens before the first, which come back as they are.
            fill: the value of a patch that was dropped: "fused", that of the token that stands for it;
                "zero"; or "nan". By default "fused" where every patch has such a token, else "zero".
            num_prefix_tokens: P, which are left out.

        Returns:
            [B, patches, C], row by row: ``.transpose(1, 2).unflatten(2, (rows, columns))`` is the grid.

        Raises:
            ValueError: there is no record, the number of tokens is not that of the stage, or nothing stands
                for some patches with `fill` "fused".
        """
        trail = self.trail
        stages = trail.stages
        through = len(stages) if num_stages is None else num_stages
        if not 0 <= through <= len(stages):
            raise ValueError(f"num_stages must be in [0, {len(stages)}], the recorded stages, got {through}")
        if fill not in (None, "fused", "zero", "nan"):
            raise ValueError(f"fill must be 'fused', 'zero' or 'nan', got {shown(fill)}")
        if tokens.dim() != 3:
            raise ValueError(f"tokens must have shape [B, P + M, C], got {tuple(tokens.shape)}")
        patches = tokens[:, num_prefix_tokens:]
        if not stages:
            raise ValueError("nothing was recorded: run the model inside evit_ext.record_tokens")
        first = trail.plan(stages[0])
        last = trail.plan(stages[through - 1])
        expected = last.num_out if through else first.num_patches
        if patches.shape[1] != expected or tokens.shape[0] != first.kept.shape[0]:
            raise ValueError(
                f"tokens must be {[first.kept.shape[0], num_prefix_tokens + expected]} [B, P + M] after "
                f"{through} of {len(stages)} stages, got {list(tokens.shape[:2])}"
            )
        places = trail.places(stages[through - 1] + 1) if through else None
        if places is None:
            return patches
        lost = places < 0
        if fill is None:
            fill = "fused" if all(trail.plan(s).represents_all for s in stages[:through]) else "zero"
        if fill == "fused":
            if not all(trail.plan(stage).represents_all for stage in stages[:through]):
                raise ValueError(
                    "fill='fused' needs a token for every patch, but the rule drops patches for good"
                )
            return ops.gather_tokens(patches, places)
        own = trail.patches(stages[through - 1] + 1)
        assert own is not None
        # The patches that still have a token of their own; a made token's −1 goes into one column more.
        is_own = torch.zeros(len(places), places.shape[1] + 1, dtype=torch.bool, device=places.device)
        is_own.scatter_(1, own.where(own >= 0, places.shape[1]), True)
        restored = ops.gather_tokens(patches, places.clamp(min=0))
        value = 0.0 if fill == "zero" else float("nan")
        return restored.masked_fill((~is_own[:, :-1] | lost).unsqueeze(2), value)

    def add(self, stage: int, plan: Plan, tokens: Tensor | None = None) -> None:
        """Record what a stage did, and the tokens [B, N, C] that it chose from, if `keep_tokens`."""
        if graph_task() != self._graph_task:
            return  # gradient checkpointing recomputes a block
        thread = self._thread if torch.compiler.is_compiling() else threading.get_ident()
        if self._private:
            if thread != self._thread:
                return
        elif plan.kept.is_meta:
            return  # count_macs runs the model
        if stage == 0:
            self._forwards[thread] = _Forward(TokenTrail(), {}, {})
        elif thread not in self._forwards:
            return  # the record began in the middle of this forward
        forward = self._forwards[thread]
        if plan.scores is not None:
            forward.scores[stage] = plan.scores.detach()
        if self.keep_tokens and tokens is not None:
            forward.tokens[stage] = tokens
        forward.trail.add(stage, plan)  # last: from here on, other threads see the stage
        self._shown = forward


def graph_task() -> int:
    """Return the number of the backward that autograd is running in this thread, -1 if it is running none.

    A block that runs inside a backward is being recomputed by gradient checkpointing, unless the whole
    forward is, because the checkpoint surrounds all of it.
    """
    return -1 if torch.compiler.is_compiling() else torch._C._current_graph_task_id()


@contextmanager
def recording(stages: Sequence[Stage], record: TokenRecord) -> Iterator[TokenRecord]:
    """Have `stages` report to `record` while the context is open."""
    with _changing_recorders():
        for number, stage in enumerate(stages):
            stage.recorders = (*stage.recorders, (record, number))
    try:
        yield record
    finally:
        with _changing_recorders():
            for stage in stages:
                stage.recorders = tuple(entry for entry in stage.recorders if entry[0] is not record)


_lock = threading.Lock()


def _changing_recorders() -> AbstractContextManager[Any]:
    """Return a context for one thread at a time. A traced program has one."""
    return nullcontext() if torch.compiler.is_compiling() else _lock


@contextmanager
def record_tokens(vit: nn.Module) -> Iterator[TokenRecord]:
    """Record which patches each stage of `vit` keeps while the context is open.

    Every forward replaces the record of the previous one; a forward that fails leaves a record of the stages
    it completed. The record stays readable after the context ends, and the model does not hold on to it.
    Contexts may be nested, and the forwards of all threads are recorded. Patches are numbered as they enter
    the first block, after timm's patch dropout, which applies in training only. While the context is open,
    blocks that keep all patches run their attention like the others: results agree up to rounding.

    Args:
        vit: a model that :func:`evit_ext.apply` changed, or a DynamicViT; wrapped or not. In training a
            DynamicViT removes no token and records nothing; its output tells what it decided.

    Yields:
        The :class:`TokenRecord`, empty until the first forward.

    Raises:
        ValueError: `vit` is no DynamicViT, and :func:`evit_ext.apply` was not called.

    Example:
        >>> with evit_ext.record_tokens(vit) as record:
        ...     logits = vit(images)
        >>> record.kept[0].shape  # 14 × 14 patches, keep rate 0.7
        torch.Size([1, 138])
    """
    with recording(stages_of(vit), TokenRecord()) as record:
        yield record
