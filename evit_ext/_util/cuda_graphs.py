"""Capturing a call in a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

Result = TypeVar("Result")


def capture(call: Callable[[], Result], device: torch.device) -> tuple[torch.cuda.CUDAGraph, Result]:
    """Capture what `call` does on a GPU, after three calls for what is set up once.

    Args:
        call: takes its tensors from where each replay shall find them.
        device: the GPU.

    Returns:
        The graph, and what the captured call returned, whose tensors every replay overwrites.

    Raises:
        RuntimeError: the call does what cannot be captured, such as waiting for the GPU.
    """
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads, such as those that load data, may go on allocating.
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                result = call()
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise RuntimeError(
                "the call cannot be captured in a CUDA graph: something in it waits for the GPU, or copies "
                "from ordinary memory of the host"
            ) from error
    return graph, result
