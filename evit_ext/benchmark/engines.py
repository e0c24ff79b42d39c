"""Models side by side in several engines: each in each in a process of its own, timed in turns."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evit_ext._util.modes import eval_mode
from evit_ext.benchmark.apart import apart
from evit_ext.benchmark.contestants import Contestant
from evit_ext.benchmark.measure import Row, cast, measured
from evit_ext.export.engines import FILE_ENGINES, compiled, load, why_not
from evit_ext.export.exporting import export_model

#: The ONNX file of a model by its name, and by whether it is one of int8.
Files = Mapping[tuple[str, bool], Path]


@contextmanager
def engine_files(
    models: Sequence[Contestant], images: Tensor, precisions: Collection[str] = ("float32",)
) -> Iterator[dict[tuple[str, bool], Path]]:
    """Provide the ONNX files that :func:`measure_engines` needs of models, and remove them afterwards.

    Those of int8 are calibrated on `images`: with random ones they are as fast as any, but no use otherwise.

    Args:
        models: float32, on the CPU.
        images: [B, 3, height, width], float32.
        precisions: in which they are to be measured; files of int8 are made if it is among them.

    Raises:
        ValueError, RuntimeError: as :func:`evit_ext.export.export_model`.
    """
    kinds = [
        kind
        for kind in (False, True)
        if (any(each != "int8" for each in precisions), "int8" in precisions)[kind]
    ]
    with tempfile.TemporaryDirectory() as folder, eval_mode(*(model.model for model in models)):
        files = {}
        for number, model in enumerate(models):
            for is_int8 in kinds:
                file = Path(folder) / f"{number}-{is_int8}.onnx"
                export_model(model.model, file, "onnx", calibration=images if is_int8 else None)
                files[model.name, is_int8] = file
        yield files


def measure_engines(
    cases: Sequence[tuple[Contestant, str]],
    images: Tensor,
    precision: str = "float32",
    files: Files | None = None,
    seconds: float = 5.0,
    least: int = 5,
) -> list[Row]:
    """Measure inference of models in engines on the CPU, on one batch, taking turns call by call.

    Each runs in its own process, see :class:`evit_ext.benchmark.Apart`, with as many threads as this one.

    Args:
        cases: models, each with an engine of :data:`evit_ext.export.ENGINES`. Others are compared with the
            first model, which must be in each engine that any other is in.
        images: [B, 3, height, width], float32, on the CPU. OpenVINO prepares for this size.
        precision: "float32", "bfloat16", "float16" or "int8". In PyTorch, weights and images are cast to it
            once.
        files: of :func:`engine_files`, for engines that run files.
        seconds: for all of them together.
        least: minimum number of timed calls of each.

    Returns:
        A row for each case, whose `mode` is the engine.

    Raises:
        ValueError: an engine does not compute in `precision` here (see :func:`evit_ext.export.why_not`), or
            the first model is not in an engine that another is in.
        RuntimeError: a call in another process failed.
    """
    first = cases[0][0].name
    lacking = {engine for _, engine in cases} - {engine for model, engine in cases if model.name == first}
    if lacking:
        raise ValueError(
            f"{first}, which others are compared with, is not run in {', '.join(sorted(lacking))}"
        )
    for engine in sorted({engine for _, engine in cases}):
        reason = why_not(engine, precision)
        if reason is not None:
            raise ValueError(f"{engine} does not compute in {precision} here: {reason}")
    makes: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {}
    named: dict[str, tuple[str, Contestant]] = {}
    with eval_mode(*(model.model for model, _ in cases)):
        for model, engine in cases:
            name = f"{engine} {model.name}"
            if engine in FILE_ENGINES:
                file = (files or {})[model.name, precision == "int8"]
                makes[name] = _of_file, (file, engine, precision, images)
            else:
                dtype = getattr(torch, precision)
                makes[name] = _of_model, (cast(model.model, dtype), engine, images.to(dtype))
            named[name] = engine, model
        with apart(makes) as calls:
            return measured(named, calls, "inference", precision, len(images), seconds, least)


def _of_file(file: Path, engine: str, precision: str, images: Tensor) -> Callable[[], object]:
    run = load(file, engine, precision, torch.get_num_threads(), len(images))
    return lambda: run(images)


def _of_model(model: torch.nn.Module, engine: str, images: Tensor) -> Callable[[], object]:
    run: Callable[[Tensor], Tensor] = compiled(model) if engine == "torch-compile" else model

    def forward() -> Tensor:
        with torch.inference_mode():
            return run(images)

    return forward
