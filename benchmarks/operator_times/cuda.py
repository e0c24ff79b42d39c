"""The operators on a GPU: which rows, in what time."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch._functorch.config
from time_limit import TimeLimit, gpu_is_lost

from evit_ext import _C
from evit_ext.ops import library

from .clocks import CudaClock
from .work import copy_bandwidth, measure

# The most telling first: what does not fit into the time is left out.
BATCHES = [256, 1, 8, 64, 1024]
QUICK_BATCHES = [256, 1]
#: Compiling takes most of the time: it is done for this model, as long as there is time for it.
COMPILED_MODEL = "DeiT-S"
#: Seconds that a row of one batch is expected to take, compiled and not, before one was measured.
COMPILED, PLAIN = 40.0, 15.0


def compile_chain(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile as users call it, for one shape."""
    return torch.compile(function, dynamic=False)


@dataclass
class Results:
    """What was measured so far."""

    bandwidth: float = 0.0  # of a large copy, GB/s
    rows: list[dict[str, Any]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


def run(
    models: list[str],
    batches: list[int],
    dtypes: list[torch.dtype],
    seconds: float,
    cache_bytes: int | None,
    limit: float,
    on_progress: Callable[[Results], object],
) -> Results:
    """Measure all rows for which there is time; `on_progress` gets what there is after each batch size."""
    if not _C.build_info()["cuda_operators"] or "cuda" not in library.KERNEL_DEVICES:
        raise SystemExit("evit_ext was built without CUDA operators: there is nothing to time")
    # A compiled backward pass otherwise writes into what the forward pass has saved, and runs only once.
    torch._functorch.config.donated_buffer = False
    torch.backends.cuda.matmul.allow_tf32 = False
    time_limit = TimeLimit(limit / 60)
    clock = CudaClock()
    cache = cache_bytes or 3 * torch.cuda.get_device_properties(0).L2_cache_size
    results = Results()
    with torch.cuda.stream(clock.stream):
        for model, batch, dtype in itertools.product(models, batches, dtypes):
            what = f"{model}, batch {batch}, {dtype}"
            if reason := gpu_is_lost() or time_limit.reason_against("plain", PLAIN):
                results.left_out.append(f"{what}: {reason}")
                continue
            compiler = compile_chain if model == COMPILED_MODEL else None
            if compiler and (reason := time_limit.reason_against("compiled", COMPILED)):
                compiler = None
                results.left_out.append(f"{what}, compiled: {reason}")
            start = time_limit.passed
            torch._dynamo.reset()  # else it gives up compiling after so many shapes
            # The best of the run counts: what a copy can do is not to be put lower by a slow moment, such as
            # before the clock rates have risen.
            results.bandwidth = max(results.bandwidth, copy_bandwidth(clock, "cuda", 2**30))
            rows, failures = measure(clock, model, batch, dtype, "cuda", seconds, cache, compiler)
            results.rows += rows
            results.failures += [f"{what}, {failure}" for failure in failures]
            if not gpu_is_lost():
                torch.cuda.empty_cache()
            time_limit.took("compiled" if compiler else "plain", time_limit.passed - start)
            on_progress(results)
            print(f"[{time_limit.passed:4.0f} s] {what}", flush=True)
    return results
