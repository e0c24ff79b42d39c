"""torch.cuda's graphs for the CPU: a capture notes which operators ran on which tensors, a replay repeats it.

As on a GPU, each tensor of a replay is where it was at the capture, no Python code of the model runs again,
and a model that asks for a value while it is captured ends with an error.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from evit_ext.patching import capturing

#: What waits for a GPU, or reads a value there.
WAITING = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique")


class Graph(TorchDispatchMode):
    """In the place of torch.cuda.CUDAGraph."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, list[Any]]] = []
        self.replays = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name.partition("::")[2].startswith(WAITING):
            raise RuntimeError("operation not permitted when stream is capturing")
        result = func(*args, **(kwargs or {}))
        # As addresses: a parameter that gets other memory leaves the graph with the old one.
        given = pytree.tree_map_only(Tensor, Tensor.detach, (args, kwargs or {}))
        self.calls.append((func, *given, pytree.tree_leaves(result)))
        return result

    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, before in self.calls:
            for old, new in zip(before, pytree.tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, Tensor) and not same_memory(old, new):
                    old.copy_(new)


def same_memory(one: Tensor, other: Tensor) -> bool:
    return one.data_ptr() == other.data_ptr()


class Stream:
    """In the place of torch.cuda.Stream and torch.cuda.Event."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: self.calls.append(name)


def graph(captured: Graph, stream: Any = None, capture_error_mode: str = "global") -> Graph:
    assert capture_error_mode == "thread_local"
    return captured


def context(*arguments: Any) -> AbstractContextManager[Any]:
    return nullcontext()


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let :func:`evit_ext.cuda_graph` take models on the CPU."""
    stream = Stream()
    for name, value in {
        "CUDAGraph": Graph,
        "graph": graph,
        "Stream": Stream,
        "Event": Stream,
        "current_stream": lambda device=None: stream,
        "stream": context,
        "device": context,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(capturing, "_DEVICES", frozenset({"cpu"}))
