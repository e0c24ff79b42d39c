"""Time EViTs in ONNX Runtime next to the dense model there, and next to both in PyTorch.

    python benchmarks/onnx_runtime.py --output benchmarks/results/onnx-runtime-cpu

The files are those of `evit export --format onnx`. All take turns, call by call, with the same threads, each
in a process of its own; the median call counts. Speed-ups are over the dense model of the same runtime.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch
from operator_times.facts import machine
from torch import Tensor, nn

from evit_ext._util.tables import aligned
from evit_ext._util.timing import Timed
from evit_ext.benchmark import apart, contestants, time_in_turns
from evit_ext.export import export_model
from evit_ext.export.onnx_file import operators, runner
from evit_ext.training.progress import Progress

HEADINGS = ["model", "runtime", "batch", "images/s", "speed-up", "ms", "GMACs"]


def main() -> None:
    """Measure, print a table, and write it where asked."""
    parser = argparse.ArgumentParser(description="Time EViTs in ONNX Runtime next to the dense model.")
    parser.add_argument("--model", default="deit_small", help="(default: deit_small)")
    parser.add_argument("--img-size", type=int, help="(default: the model's own)")
    parser.add_argument("--keep-rate", nargs="+", type=float, default=[0.7, 0.5], metavar="RATE")
    parser.add_argument("--batch-size", nargs="+", type=int, default=[1, 4, 16], metavar="N")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=30.0, help="for each batch size (default: 30)")
    parser.add_argument("--output", type=Path, metavar="STEM", help="write STEM.json and STEM.md, too")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    size = {} if options.img_size is None else {"img_size": options.img_size}
    models = contestants(options.model, options.keep_rate, torch.device("cpu"), **size)
    found: dict[str, dict[str, int]] = {}
    shape: tuple[int, ...] = ()
    gmacs = {contestant.name: contestant.gmacs for contestant in models}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{number}.onnx" for number, _ in enumerate(models)]
        for contestant, file in zip(models, files, strict=True):
            exported = export_model(contestant.model.eval(), file, "onnx", name=options.model)
            shape = exported.metadata.input_size
            found[contestant.name] = dict(operators(onnx.load(str(file))))
        with Progress("benchmark", len(options.batch_size), True) as progress:
            for batch in options.batch_size:
                images = torch.randn(batch, *shape)
                makes: dict[str, Any] = {}
                for contestant, file in zip(models, files, strict=True):
                    makes[f"{contestant.name}|ONNX Runtime"] = in_onnx_runtime, (file, images)
                    makes[f"{contestant.name}|PyTorch"] = in_pytorch, (contestant.model, images)
                with apart(makes) as calls:
                    rows += measure(calls, batch, gmacs, options.seconds)
                progress.step(batch=str(batch))
    lines = [HEADINGS, *([str(row[name]) for name in HEADINGS] for row in rows)]
    text = aligned(lines)
    print(text)
    if options.output is not None:
        facts = {**machine("cpu"), "onnxruntime": onnxruntime.__version__, "threads": options.threads}
        options.output.parent.mkdir(parents=True, exist_ok=True)
        everything = {"machine": facts, "model": options.model, "rows": rows, "operators": found}
        options.output.with_suffix(".json").write_text(json.dumps(everything, indent=1) + "\n")
        said = "".join(f"- {name}: {fact}\n" for name, fact in facts.items())
        heading = f"# {options.model} in ONNX Runtime\n\n{said}"
        options.output.with_suffix(".md").write_text(f"{heading}\n```\n{text}\n```\n")


def in_onnx_runtime(file: Path, images: Tensor) -> Callable[[], Tensor]:
    """Return what runs an exported model on images."""
    run = runner(file, torch.get_num_threads())
    return lambda: run(images)


def in_pytorch(model: nn.Module, images: Tensor) -> Callable[[], Tensor]:
    """Return what runs a model on images, for inference."""

    def run() -> Tensor:
        with torch.inference_mode():
            return model(images)

    return run


def measure(
    calls: Mapping[str, Timed], batch: int, gmacs: Mapping[str, float | None], seconds: float
) -> list[dict[str, Any]]:
    """Return a row for each of `calls`, named model|runtime, the first model of which is the dense one."""
    times = time_in_turns(calls, seconds)
    runs = [tuple(key.split("|")) for key in calls]
    medians = {key: statistics.median(times["|".join(key)]) for key in runs}
    dense = runs[0][0]
    return [
        {
            "model": name,
            "runtime": runtime,
            "batch": batch,
            "images/s": round(batch / median, 1),
            "speed-up": round(medians[dense, runtime] / median, 2),
            "ms": round(median * 1e3, 2),
            "GMACs": None if gmacs[name] is None else round(gmacs[name], 3),
        }
        for (name, runtime), median in medians.items()
    ]


if __name__ == "__main__":
    main()
