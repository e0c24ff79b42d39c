"""Inference and training steps of several models, timed in turns: eager, compiled and with CUDA graphs."""

from __future__ import annotations

import contextlib
import copy
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from evit_ext._util.choices import MODES, TASKS
from evit_ext._util.cuda_graphs import capture
from evit_ext._util.messages import shown
from evit_ext._util.modes import eval_mode
from evit_ext._util.timing import Here, Timed, time_in_turns
from evit_ext.benchmark.apart import apart as in_processes
from evit_ext.benchmark.contestants import Contestant
from evit_ext.training.compiling import allow_recompiles
from evit_ext.training.precision import Precision, attention_for_training, autocast

#: What keeps its memory between calls, so that what a call adds is not what it needs.
_KEEP_MEMORY = ("cudagraph", "onnxruntime", "openvino")


@dataclass(frozen=True, kw_only=True)
class Row:
    """The measurements of a model.

    Attributes:
        model: its name in the benchmark.
        keep_rate, gmacs: as in :class:`Contestant`.
        task, mode, precision, batch: what was run.
        images_per_second: batch / median time.
        speedup: over the first model with the same task, mode, precision and batch.
        over_fastest: over the first model in the fastest of the modes that were measured together.
        milliseconds: median time of a call.
        milliseconds_90, milliseconds_99: percentiles of the time; None if fewer than 10 or 100 calls were
            timed, because the percentile would then be the slowest call.
        calls: number of calls that were timed.
        peak_memory: peak bytes in use during a call, beyond those before it, see :func:`memory_added`; None
            if not measured, as for CUDA graphs, which reserve their memory when they are captured, and for
            ONNX Runtime and OpenVINO, which keep theirs.
    """

    model: str
    keep_rate: float | None
    gmacs: float | None
    task: str
    mode: str
    precision: str
    batch: int
    images_per_second: float
    speedup: float
    over_fastest: float
    milliseconds: float
    milliseconds_90: float | None
    milliseconds_99: float | None
    calls: int
    peak_memory: int | None


def measure(
    models: Sequence[Contestant],
    images: Tensor,
    task: str = "inference",
    modes: Sequence[str] = ("eager",),
    precision: Precision | None = None,
    seconds: float = 5.0,
    least: int = 5,
    apart: bool | None = None,
) -> list[Row]:
    """Measure models on one batch in all modes, taking turns call by call.

    On the CPU each runs in its own process, see :class:`evit_ext.benchmark.Apart`.

    Args:
        models: the others are compared with the first. In training, their weights change.
        images: [B, 3, height, width], float32, on the models' device.
        task: one of :data:`TASKS`.
        modes: from :data:`MODES`.
        precision: float32 by default. In inference, weights and images are cast to it once, which is the
            fastest way; in training it is the dtype of autocast.
        seconds: for all models and modes together.
        least: minimum number of timed calls of each.
        apart: whether each model and mode runs in its own process, for which the model is pickled; by default
            only on the CPU. On a GPU, where PyTorch's allocator keeps its memory, they share this process.

    Returns:
        A row for each mode and model.

    Raises:
        ValueError: unknown task or mode, or CUDA graphs without a GPU or for training.
        TypeError: a model cannot be pickled for its own process.
        RuntimeError: a call in another process failed.
    """
    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {shown(task)}")
    for mode in modes:
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {shown(mode)}")
        if mode == "cudagraph" and (task == "training" or not images.is_cuda):
            raise ValueError("CUDA graphs are for inference on a GPU: leave the mode 'cudagraph' out")
    precision = precision or Precision(torch.float32, "the default")
    with contextlib.ExitStack() as stack:
        stack.enter_context(eval_mode(*(model.model for model in models)))
        if task == "inference":
            images = images.to(precision.dtype)
            models = [replace(model, model=cast(model.model, precision.dtype)) for model in models]
        cases = {f"{mode} {model.name}": (mode, model) for mode in modes for model in models}
        makes = {
            name: (_call, (mode, task, model.model, images, precision))
            for name, (mode, model) in cases.items()
        }
        calls: Mapping[str, Timed]
        if apart if apart is not None else not images.is_cuda:
            calls = stack.enter_context(in_processes(makes))
        else:
            stack.enter_context(allow_recompiles(len(cases)))
            calls = {name: Here(make(*given), images.device) for name, (make, given) in makes.items()}
        return measured(cases, calls, task, precision_name(precision), len(images), seconds, least)


def measured(
    cases: Mapping[str, tuple[str, Contestant]],
    calls: Mapping[str, Timed],
    task: str,
    precision: str,
    batch: int,
    seconds: float,
    least: int,
) -> list[Row]:
    """Time calls in turns and return a row for each.

    Args:
        cases: mode and model of each call, by its name; those of the first model are what others are compared
            with.
        calls: by the same names.
        task, precision, batch: for the rows.
        seconds, least: of :func:`time_in_turns`.
    """
    times = time_in_turns(calls, seconds, least)
    memory = {name: None if cases[name][0] in _KEEP_MEMORY else call.memory() for name, call in calls.items()}
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    (_, first), *_ = cases.values()
    firsts = {mode: medians[name] for name, (mode, model) in cases.items() if model.name == first.name}
    rows = []
    for name, (mode, model) in cases.items():
        taken, median = sorted(times[name]), medians[name]
        rows.append(
            Row(
                model=model.name,
                keep_rate=model.keep_rate,
                gmacs=model.gmacs,
                task=task,
                mode=mode,
                precision=precision,
                batch=batch,
                images_per_second=batch / median,
                speedup=firsts[mode] / median,
                over_fastest=min(firsts.values()) / median,
                milliseconds=1e3 * median,
                milliseconds_90=_percentile(taken, 90),
                milliseconds_99=_percentile(taken, 99),
                calls=len(taken),
                peak_memory=memory[name],
            )
        )
    return rows


def precision_name(precision: Precision) -> str:
    """Return the name of a precision as rows have it, such as "bfloat16"."""
    return str(precision.dtype).removeprefix("torch.")


def cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return a model with weights in `dtype`: itself if they already are, else a copy."""
    if all(parameter.dtype == dtype for parameter in model.parameters()):
        return model
    return copy.deepcopy(model).to(dtype)


def _call(
    mode: str, task: str, model: nn.Module, images: Tensor, precision: Precision
) -> Callable[[], object]:
    run: Callable[[Tensor], Tensor] = torch.compile(model, dynamic=False) if mode == "compile" else model
    if task == "training":
        return _training_step(model, run, images, precision)

    def forward() -> Tensor:
        with torch.inference_mode():
            return run(images)

    return _captured(forward, images.device) if mode == "cudagraph" else forward


def _training_step(
    model: nn.Module, run: Callable[[Tensor], Tensor], images: Tensor, precision: Precision
) -> Callable[[], object]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    labels = torch.arange(len(images), device=images.device) % 10

    def step() -> None:
        model.train()
        with attention_for_training(images.device, precision):
            with autocast(images.device, precision):
                logits = run(images)
            nn.functional.cross_entropy(logits.float(), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _captured(call: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """Return a function that replays a call from a CUDA graph."""
    graph, result = capture(call, device)

    def replay() -> object:
        graph.replay()
        return result

    return replay


def _percentile(ordered: list[float], percent: int) -> float | None:
    """Return the smallest time, in ms, that this percentage of the calls did not exceed."""
    if len(ordered) * (100 - percent) < 100:
        return None
    return 1e3 * ordered[math.ceil(percent * len(ordered) / 100) - 1]
