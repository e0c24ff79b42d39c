"""Which patches each stage of an EViT or a DynamicViT kept, and with what scores."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from evit_ext.patching.families import applied_blocks
from evit_ext.tokens.trail import TokenTrail


class Stage(Protocol):
    """What reports to records: a reorganising block, or a predictor of a DynamicViT."""

    recorders: tuple[tuple[TokenRecord, int], ...]


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
        self.trail = TokenTrail()
        #: For each stage, the tokens [B, N, C] that it chose from, if `keep_tokens`.
        self.tokens: dict[int, Tensor] = {}
        self._scores: dict[int, Tensor] = {}
        #: The last forward of each thread: `trail`, `tokens` and `scores`, which are those of one of them.
        self._forwards: dict[int, tuple[TokenTrail, dict[int, Tensor], dict[int, Tensor]]] = {}

    @property
    def kept(self) -> list[Tensor]:
        """For each stage, the patches it kept: int64 [B, K], numbers in the original grid, row by row.

        In ascending order, except that -1, which stands for a fused token of an earlier stage, comes last.
        """
        return [self.trail.kept(stage) for stage in self.trail.stages]

    @property
    def scores(self) -> list[Tensor]:
        """For each stage, the scores [B, N - P] of the patch tokens that entered it.

        They are in the order of the tokens: at the first stage all patches, at a later one ``kept`` of the
        stage before followed by its fused token. float32, float64 for float64 models. Of a DynamicViT, the
        log-probabilities of being kept, in the dtype that the model computes in.
        """
        return [self._scores[stage] for stage in sorted(self._scores)]

    def add(
        self, stage: int, kept: Tensor, scores: Tensor, fused: bool, tokens: Tensor | None = None
    ) -> None:
        """Record a stage: `kept` [B, K] among its `scores` [B, N - P], and whether it fused."""
        if graph_task() != self._graph_task:
            return  # gradient checkpointing recomputes a block
        thread = self._thread if torch.compiler.is_compiling() else threading.get_ident()
        if self._private:
            if thread != self._thread:
                return
        elif kept.is_meta:
            return  # count_macs runs the model
        if stage == 0:
            self._forwards[thread] = (TokenTrail(), {}, {})
        elif thread not in self._forwards:
            return  # the record began in the middle of this forward
        trail, of_tokens, of_scores = self._forwards[thread]
        of_scores[stage] = scores.detach()
        if self.keep_tokens and tokens is not None:
            of_tokens[stage] = tokens
        trail.add(stage, kept, scores.shape[1], fused)
        self.trail, self.tokens, self._scores = trail, of_tokens, of_scores


def graph_task() -> int:
    """Return the number of the backward that autograd is running in this thread, -1 if it is running none.

    A block that runs inside a backward is being recomputed by gradient checkpointing, unless the whole
    forward is, because the checkpoint surrounds all of it.
    """
    return -1 if torch.compiler.is_compiling() else torch._C._current_graph_task_id()


def _stages(vit: Any) -> Sequence[Stage]:
    """Return the modules of `vit` that report to records; ValueError if there are none."""
    return vit.stages() if hasattr(vit, "score_predictor") else applied_blocks(vit)


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
    blocks that keep all patches run their attention like the others: results agree up to rounding, and hooks
    on ``attn`` are not called.

    Args:
        vit: a model that :func:`evit_ext.apply` changed, or a DynamicViT. In training a DynamicViT removes no
            token and records nothing; its output tells what it decided.

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
    with recording(_stages(vit), TokenRecord()) as record:
        yield record
