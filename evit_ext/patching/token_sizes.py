"""Of how many patches each token of a forward is made, handed from block to block.

Rules that merge tokens weigh them by it, and so may the attention of the blocks that follow. The models that
hold the blocks pass nothing but tokens from one to the next, so the sizes take a way of their own.

Notation: B batch, N tokens, P prefix tokens.
"""

from __future__ import annotations

import threading
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from evit_ext.ops import checks
from evit_ext.patching.recording import graph_task
from evit_ext.tokens.plan import Plan
from evit_ext.tokens.rule import Rule


class Carried(NamedTuple):
    """What a block is told of the tokens that enter it.

    Attributes:
        sizes: how many patches each patch token is made of, [B, N − P], float32 (float64 for float64); None
            where each is one.
        bias: logarithm of the sizes, which the attention adds to its logits for each key, [B, 1, 1, N], dtype
            of the tokens; None where it adds nothing.
    """

    sizes: Tensor | None = None
    bias: Tensor | None = None


class _Now(threading.local):
    """What the last reduction of a thread's forward said."""

    carried = Carried()
    graph_task = -1


class TokenSizes:
    """Carries the sizes of the tokens through the blocks of one model, of which each holds the same object.

    Threads may run the model at the same time, but for one whose blocks are compiled one by one, as a graph
    cannot tell threads apart. Gradient checkpointing runs a block again in the backward,
    perhaps in another thread and after other forwards: what entered it is then found by its input, which the
    checkpoint has kept.
    """

    def __init__(self) -> None:
        self._now = _Now()
        #: What any thread's forward said last, for graphs of torch.compile; and whether a graph said it.
        self._last = Carried()
        self._is_of_graph = False
        #: By the storage of a block's input. An entry whose storage is gone waits for the next forward.
        self._entered: dict[StorageWeakRef, Carried] = {}

    def __reduce__(self) -> Any:
        return TokenSizes, ()  # a copy of the model begins without a forward

    def enter(self, x: Tensor, first: bool, last: bool) -> Carried:
        """Return what is known of the tokens `x` [B, N, C] that enter a block.

        Args:
            x: tokens [B, N, C].
            first: the block is the first that may reduce tokens, with which a forward begins.
            last: no block comes after it.

        Raises:
            RuntimeError: a block is run again in the backward, on an input that it never got; or alone, on
                tokens that are not those of the last forward.
        """
        if torch.compiler.is_compiling():
            carried = Carried() if first else self._last
            # A graph of the whole model leaves nothing behind.
            self._last, self._is_of_graph = Carried() if last else carried, not last
            return carried
        key, task = _key(x), graph_task()
        if self._runs_again(task):
            if key in self._entered:
                return self._entered[key]
            if not first:
                raise RuntimeError(
                    "gradient checkpointing runs a block again on tokens whose sizes are not known: "
                    "checkpoint each block by itself, not several together; or something between the "
                    "blocks, such as torch.autograd.graph.saved_tensors_hooks or "
                    "FullyShardedDataParallel, replaced its input"
                )
        if first:
            self._now.carried, self._now.graph_task = Carried(), task
            self._last, self._is_of_graph = Carried(), False
            for kept in list(self._entered):  # other threads may add to it meanwhile
                if kept.expired():
                    self._entered.pop(kept, None)
        carried = self._last if self._is_of_graph else self._now.carried
        if carried.sizes is not None and carried.sizes.shape[0] != x.shape[0]:
            raise RuntimeError(
                f"a block got {x.shape[0]} images, whose tokens' sizes are not known: those of the last "
                f"forward were {carried.sizes.shape[0]}; call the whole model, not a part of it"
            )
        if key is not None:
            self._entered[key] = carried
        return carried

    def leave(self, x: Tensor, rule: Rule, plan: Plan, before: Carried, num_prefix_tokens: int) -> None:
        """Tell the blocks that follow what `rule` did, by `plan`, with the tokens `x` that entered."""
        compiling = torch.compiler.is_compiling()
        if not compiling and self._runs_again(graph_task()):
            return  # they have been told
        if before.sizes is None and "sizes" not in rule.wants():
            return
        sizes = plan.merged_sizes(before.sizes, checks.accumulation_dtype(x.dtype), x.device)
        bias = None
        if rule.proportional or before.bias is not None:
            logs = torch.nn.functional.pad(sizes.log(), (num_prefix_tokens, 0))
            bias = logs.to(x.dtype)[:, None, None]
        carried = Carried(sizes, bias)
        self._last, self._is_of_graph = carried, compiling
        if not compiling:
            self._now.carried = carried  # another thread may have set the other meanwhile

    def _runs_again(self, task: int) -> bool:
        """Return whether a block runs in the backward `task` (a graph task) without its whole forward."""
        return task != -1 and self._now.graph_task != task


def _key(x: Tensor) -> StorageWeakRef | None:
    """Return what tells the input of a block from others while it lives; None where none is computed."""
    plain = type(x) is Tensor and not x.is_meta and not checks.in_function_transform()
    return StorageWeakRef(x.untyped_storage()) if plain else None
