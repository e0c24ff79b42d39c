"""``evit benchmark``: how fast a model is, dense and at several keep rates, side by side."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from evit_ext._util.files import replacing
from evit_ext._util.tables import aligned
from evit_ext.benchmark import Contestant, Row, contestants, engine_files, measure, measure_engines
from evit_ext.benchmark.engines import Files
from evit_ext.cli.options import chosen_device
from evit_ext.cli.output import check_writable, say_next
from evit_ext.cli.runs import run_classes, run_config, run_of
from evit_ext.export.engines import FILE_ENGINES, check_engine, why_not
from evit_ext.training.precision import choose_precision
from evit_ext.training.progress import Progress

_BATCHES = {"cpu": [1, 4, 16], "cuda": [1, 8, 64, 256]}


def run(options: argparse.Namespace) -> None:
    _check(options)
    if options.output is not None:
        check_writable(options.output)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    device = torch.device("cpu") if options.engine else chosen_device(options)
    name, rates, arguments = _model(options)
    torch.manual_seed(0)
    models = contestants(name, rates, device, **arguments)
    embed: Any = models[0].model.patch_embed
    groups = [
        (task, precision, batch)
        for task in options.task
        for precision in options.precision
        for batch in options.batch_size or _BATCHES[device.type]
    ]
    rows: list[Row] = []
    missing: dict[tuple[str, str], str] = {}
    with contextlib.ExitStack() as stack:
        files = stack.enter_context(_files(models, options, missing)) if options.engine else {}
        shown = options.progress and not options.json
        progress = stack.enter_context(Progress("benchmark", len(groups), shown))
        for task, precision, batch in groups:
            images = torch.randn(batch, 3, *embed.img_size, device=device)
            least = max(5, options.latency_calls) if (task, batch) == ("inference", 1) else 5
            if options.engine:
                cases = [
                    (model, engine)
                    for engine in options.engine
                    for model in models
                    if (engine, precision) not in missing
                ]
                if cases:
                    rows += measure_engines(cases, images, precision, files, options.seconds, least)
            else:
                modes = [mode for mode in options.mode if mode != "cudagraph" or task == "inference"]
                chosen = choose_precision(device, precision)
                rows += measure(models, images, task, modes, chosen, options.seconds, least)
            progress.step(task=task, precision=precision, batch=str(batch))
    everything = {
        "model": options.named,
        "device": _device_name(device),
        "rows": [asdict(row) for row in rows],
        "not_available": [
            {"engine": engine, "precision": precision, "reason": reason}
            for (engine, precision), reason in missing.items()
        ],
    }
    text = table(rows, missing if options.engine else None)
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        contents = {"json": json.dumps(everything, indent=1), "md": f"# {options.named}\n\n{text}"}
        for ending, content in contents.items():
            with replacing(options.output.with_name(f"{options.output.name}.{ending}")) as file:
                file.write(f"{content}\n")
    if options.json:
        print(json.dumps(everything, indent=2))
        return
    print(text)
    weights = [] if _is_run(options.named) else ["--random-weights"]
    say_next(["evit", "export", options.named, *weights, "--format", "onnx"])


def _model(options: argparse.Namespace) -> tuple[str, list[float | None], dict[str, Any]]:
    """Return the model's name, the keep rates, and further arguments of :func:`contestants`."""
    size = {} if options.img_size is None else {"img_size": options.img_size}
    if not _is_run(options.named):
        return options.named, options.keep_rate or [0.7, 0.5], size
    config = run_config(options.named, size)
    names = run_classes(options.named)
    classes = config.num_classes if names is None else len(names)
    given = {"img_size": config.img_size, "num_classes": classes}
    arguments = {**config.model_args, **{name: value for name, value in given.items() if value is not None}}
    reduction = {name: getattr(config, name) for name in ("drop_loc", "fuse_token", "rule", "rule_args")}
    own: list[float | None] = (
        [0.7, 0.5] if config.keep_rate is None and config.rule is None else [config.keep_rate]
    )
    rates = options.keep_rate or own
    return config.model, rates, {"reduction": reduction, **arguments}


@contextlib.contextmanager
def _files(
    models: Sequence[Contestant], options: argparse.Namespace, missing: dict[tuple[str, str], str]
) -> Iterator[Files]:
    """Provide the files that engines need, and note what these do not compute in."""
    for precision in options.precision:
        for engine in options.engine:
            reason = why_not(engine, precision)
            if reason is not None:
                missing[engine, precision] = reason
    needed = [
        precision
        for precision in options.precision
        if any(engine in FILE_ENGINES and (engine, precision) not in missing for engine in options.engine)
    ]
    if not needed:
        yield {}
        return
    embed: Any = models[0].model.patch_embed
    with engine_files(models, torch.randn(8, 3, *embed.img_size), needed) as files:
        yield files


def _is_run(named: str) -> bool:
    return Path(named).is_dir() and run_of(named) is not None


def _check(options: argparse.Namespace) -> None:
    """Raise ValueError for options with which nothing could be measured."""
    numbers = {
        "--batch-size": min(options.batch_size or [1]),
        "--threads": options.threads,
        "--img-size": options.img_size,
        "--latency-calls": options.latency_calls,
    }
    for name, value in numbers.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if options.engine is None and "int8" in options.precision:
        raise ValueError("--precision int8 is for --engine onnxruntime and openvino")
    if options.engine is not None:
        for engine in options.engine:
            check_engine(engine)
        if options.task != ["inference"] or options.mode != ["eager"] or options.device == "cuda":
            raise ValueError(
                "--engine compares inference on the CPU: leave out --task, --mode and --device, or --engine"
            )
        if "auto" in options.precision:
            raise ValueError("--engine compares precisions by name, which auto is not")
    if not 0 < options.seconds < math.inf:
        raise ValueError(f"--seconds must be positive, got {options.seconds:g}")


def table(rows: list[Row], missing: Mapping[tuple[str, str], str] | None = None) -> str:
    """Return the rows as a table; a dash stands for what was not measured.

    Args:
        rows: of :func:`evit_ext.benchmark.measure`.
        missing: of a measurement of engines: by engine and precision, why it does not compute in that. The
            table then also compares with the fastest engine of the first model.
    """
    columns = (
        *(
            "model",
            "task",
            "mode" if missing is None else "engine",
            "precision",
            "batch",
            "images/s",
            "speed-up",
        ),
        *(() if missing is None else ("over fastest dense",)),
        *("ms", "90 %", "99 %", "calls", "MiB", "GMACs"),
    )
    lines = [list(columns)]
    for row in rows:
        lines.append(
            [
                row.model,
                row.task,
                row.mode,
                row.precision,
                str(row.batch),
                f"{row.images_per_second:.1f}",
                f"{row.speedup:.2f}",
                *([] if missing is None else [f"{row.over_fastest:.2f}"]),
                f"{row.milliseconds:.2f}",
                _or_dash(row.milliseconds_90, ".2f"),
                _or_dash(row.milliseconds_99, ".2f"),
                str(row.calls),
                _or_dash(None if row.peak_memory is None else row.peak_memory / 2**20, ".0f"),
                _or_dash(row.gmacs, ".3g"),
            ]
        )
    for engine, precision in missing or ():
        left = ["not available", "inference", engine, precision]
        lines.append([*left, *["–"] * (len(columns) - len(left))])
    reasons = [f"{engine}, {precision}: {reason}" for (engine, precision), reason in (missing or {}).items()]
    return "\n\n".join([aligned(lines), *(["not available:\n" + "\n".join(reasons)] if reasons else [])])


def _or_dash(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _device_name(device: torch.device) -> str:
    return (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads"
    )
