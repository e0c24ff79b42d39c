"""Time a model, dense and as an EViT, in the engines that people serve it with on a CPU.

    python benchmarks/engines.py --output benchmarks/results/engines-cpu

PyTorch as it is, also with packed weights (evit_ext.prepack), torch.compile with weights as constants, ONNX
Runtime and OpenVINO, the last two with the files of `evit export`, in each precision that each has. All take
turns, call by call, with the same threads, each in a process of its own; the median call counts. Files of
int8 are calibrated on random images, which is enough to time them.

Then the share of the reduction in a call, by the profile of each engine that runs files (engine_profiles.py).
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from engine_profiles import Profile, profile_onnxruntime, profile_openvino
from operator_times.facts import commit, machine
from prepacked import Prepacked

from evit_ext._util.tables import aligned
from evit_ext.benchmark import Row, contestants, engine_files, measure_engines
from evit_ext.cli.benchmark import table
from evit_ext.export import ENGINES, why_not
from evit_ext.training.progress import Progress

#: In PyTorch as it is only: in the others it makes no difference.
PACKED = ", prepacked"


def parse() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="deit_small", help="(default: deit_small)")
    parser.add_argument("--img-size", type=int, help="(default: the model's own)")
    parser.add_argument("--keep-rate", nargs="+", type=float, default=[0.7], metavar="RATE")
    parser.add_argument("--batch-size", nargs="+", type=int, default=[1, 16], metavar="N")
    parser.add_argument(
        "--precision",
        nargs="+",
        choices=["float32", "bfloat16", "int8"],
        default=["float32", "bfloat16", "int8"],
    )
    parser.add_argument("--engine", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=20.0, help="for each group of rows (default: 20)")
    parser.add_argument(
        "--latency-calls", type=int, default=40, metavar="N", help="of each at batch 1 at least (default: 40)"
    )
    parser.add_argument("--output", type=Path, metavar="STEM", help="write STEM.json and STEM.md, too")
    return parser.parse_args()


def main() -> None:
    """Measure, print tables, and write them where asked."""
    options = parse()
    commit()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    size = {} if options.img_size is None else {"img_size": options.img_size}
    models = contestants(options.model, options.keep_rate, torch.device("cpu"), **size)
    packed = [replace(evit, name=f"{evit.name}{PACKED}", model=Prepacked(evit.model)) for evit in models[1:]]
    side: Any = models[0].model.patch_embed
    missing = {
        (engine, precision): reason
        for precision in options.precision
        for engine in options.engine
        if (reason := why_not(engine, precision)) is not None
    }
    rows: list[Row] = []
    profiles: list[Profile] = []
    images = torch.randn(max(8, *options.batch_size), 3, *side.img_size)
    with engine_files(models, images[:8], options.precision) as files:
        groups = [(precision, batch) for precision in options.precision for batch in options.batch_size]
        with Progress("benchmark", len(groups), True) as progress:
            for precision, batch in groups:
                engines = [engine for engine in options.engine if (engine, precision) not in missing]
                cases = [
                    (model, engine)
                    for engine in engines
                    for model in [*models, *(packed if engine == "torch" else [])]
                ]
                least = options.latency_calls if batch == 1 else 5
                if cases:
                    rows += measure_engines(cases, images[:batch], precision, files, options.seconds, least)
                progress.step(precision=precision, batch=str(batch))
        for model in models:
            for batch in options.batch_size:
                given = files[model.name, "float32" not in options.precision], images[:batch], options.threads
                if "onnxruntime" in options.engine:
                    profiles.append(profile_onnxruntime(model.name, *given))
                if "openvino" in options.engine:
                    profiles.append(profile_openvino(model.name, *given))
    report(options, rows, missing, profiles)


def report(
    options: argparse.Namespace,
    rows: list[Row],
    missing: dict[tuple[str, str], str],
    profiles: list[Profile],
) -> None:
    """Print what was measured, and write it where asked."""
    headings = ["model", "engine", "batch", "ms", "reduction ms", "share %", "attention is"]
    lines = [headings, *(found.cells() for found in profiles)]
    text = f"{table(rows, missing)}\n\n{aligned(lines)}" if profiles else table(rows, missing)
    print(text)
    if options.output is None:
        return
    facts = {**machine("cpu"), **versions(options.engine), "threads": options.threads}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    everything = {
        "machine": facts,
        "model": options.model,
        "rows": [asdict(row) for row in rows],
        "not_available": [[*key, reason] for key, reason in missing.items()],
        "profiles": [asdict(found) for found in profiles],
    }
    options.output.with_suffix(".json").write_text(json.dumps(everything, indent=1) + "\n")
    said = "".join(f"- {name}: {fact}\n" for name, fact in facts.items())
    explained = (
        "ms: median of the calls, which take turns. Speed-up: over the dense model in the same engine and "
        "precision. Over fastest dense: over the dense model in the engine that runs it fastest, in the same "
        "precision and batch. A dash: not measured. The second table is of the engines' own profiles, in "
        "float32: what belongs to the reduction of tokens, and its share of all operators."
    )
    heading = f"# {options.model} in several engines\n\n{said}\n{explained}"
    options.output.with_suffix(".md").write_text(f"{heading}\n\n```\n{text}\n```\n")


def versions(engines: list[str]) -> dict[str, str]:
    """Return the versions of the engines that run files."""
    found = {}
    if "onnxruntime" in engines:
        import onnxruntime

        found["onnxruntime"] = str(onnxruntime.__version__)
    if "openvino" in engines:
        import openvino

        found["openvino"] = str(openvino.__version__)
    return found


if __name__ == "__main__":
    main()
