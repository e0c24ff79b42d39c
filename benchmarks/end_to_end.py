"""Time DeiT-S as an EViT next to what people would use instead.

    python benchmarks/end_to_end.py --output benchmarks/results/end-to-end-cpu
    python benchmarks/end_to_end.py --device cuda --output benchmarks/results/end-to-end-cuda

Instead: timm's dense model; EViT as it is usually written (plain_evit.py); both under torch.compile and, on a
GPU, in CUDA graphs; both in ONNX Runtime on the CPU (onnx_rivals.py); DynamicViT. All take turns, call by
call, on the CPU each in a process of its own, with the same weights where they have the same parameters; the
logits of what should give the same are compared before anything is timed. The median call counts. The plot
shows images per second against the keep rate.

On a GPU there is a time limit, 6.5 minutes by default: what tells most is measured first, what does not fit
is left out, and the results say so. They are written after every group.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import math
import sys
from dataclasses import asdict, dataclass, replace
from typing import Any

import benchmark_options
import onnx_rivals
import torch
from end_to_end_plot import ONNX, plot, shown_in_plot
from operator_times.facts import commit, machine
from plain_evit import PlainEViT
from prepacked import Prepacked
from time_limit import Missing, in_time

from evit_ext.benchmark import Contestant, Row, contestants, measure
from evit_ext.cli.benchmark import table
from evit_ext.cli.grammar.benchmark import LATENCY_CALLS
from evit_ext.cpu import replacing
from evit_ext.patching.families import family_of
from evit_ext.training.precision import choose_precision

KEEP_RATES = (0.9, 0.8, 0.7, 0.6, 0.5)
SOME = (0.7, 0.5)  # where not all keep rates take part
ONE = (0.7,)  # of what is compiled first, for 10 to 20 seconds each on two cores
FASTER = "dense, EViT's forwards"
PREPACKED = ", prepacked"
GPU_MINUTES = 6.5
#: On a GPU these come first, in bfloat16: task, mode, batch. What compiles comes last, as it takes longest.
FIRST = (
    ("inference", "eager", 256),
    ("training", "eager", 256),
    ("inference", "cudagraph", 1),
    ("inference", "compile", 256),
)
#: Seconds that a model is expected to take to compile; on two cores it took 10 to 20.
COMPILING = 25.0
SAME_IMAGES = 8


@dataclass(frozen=True)
class Group:
    """What takes turns, and how it is run; `least` calls of each in any case."""

    task: str
    precision: str
    batch: int
    mode: str
    keep_rates: tuple[float, ...]
    seconds: float
    least: int

    def __str__(self) -> str:
        return f"{self.task}, {self.precision}, batch {self.batch}, {self.mode}"

    def expected_seconds(self) -> float:
        """Return how long it may take: three models are compiled for each keep rate, all are called once."""
        compiled = 1 + 2 * len(self.keep_rates) if self.mode == "compile" else 0
        return self.seconds + 5.0 + COMPILING * compiled


def field(model: str, keep_rates: tuple[float, ...], device: torch.device) -> list[Contestant]:
    """Return the dense model, its EViTs, those in plain PyTorch, and DynamicViTs of the same keep rates."""
    dense, *evits = contestants(f"deit_{model}", keep_rates, device)
    plain = []
    for evit in evits:
        written = PlainEViT(dense.model, evit.keep_rate).to(device).eval()
        _assert_same(written, evit.model, _images(dense, SAME_IMAGES, device))
        plain.append(Contestant(f"plain EViT {evit.keep_rate:g}", written, evit.keep_rate, evit.gmacs))
    rivals = contestants(f"dynamicvit_{model}", keep_rates, device)[1:]
    # ToMe at the same blocks, to as many tokens as an EViT. Its rule merges no more than half of them.
    some = [rate for rate in keep_rates if rate in SOME]
    rivals += contestants(f"deit_{model}", some, device, {"rule": "tome"})[1:]
    if device.type != "cpu":
        return [dense, *evits, *plain, *rivals]
    packed = [
        replace(entry, name=f"{entry.name}{PREPACKED}", model=Prepacked(entry.model))
        for entry in evits
        if entry.keep_rate in SOME
    ]
    return [dense, _with_faster_forwards(dense), *evits, *packed, *plain, *rivals]


def _with_faster_forwards(dense: Contestant) -> Contestant:
    """Return the dense model with the forwards that an EViT's blocks have on the CPU, to tell their part."""
    model: Any = copy.deepcopy(dense.model)
    family = family_of(model)
    parts = [part for block in model.blocks for part in block.children()]
    replacing.replace(parts, family.cpu_forwards)
    replacing.set_active(parts, True)
    return replace(dense, name=FASTER, model=model)


def in_onnx_runtime(models: list[Contestant], images: torch.Tensor) -> list[Contestant]:
    """Return the dense model and the plain EViTs among the models, run by ONNX Runtime."""
    given = {entry.keep_rate for entry in models}
    rates = given & set(SOME) or given
    found = []
    for entry in models:
        # Exporting one takes seconds, and each is exported for each batch.
        if entry.name == "dense" or (entry.name.startswith("plain") and entry.keep_rate in rates):
            exported = onnx_rivals.OnnxModel(entry.model, images)
            _assert_same(entry.model, exported, images)
            found.append(replace(entry, name=f"{ONNX} {entry.name}", model=exported))
    return found


@torch.inference_mode()
def _assert_same(wanted: Any, model: Any, images: torch.Tensor) -> None:
    """Raise AssertionError where the logits are not the same but for rounding.

    One image in four may differ: where two patches have all but the same score at the limit of what is kept,
    rounding decides between them, and differently from device to device.
    """
    expected = wanted(images)
    off = (model(images) - expected).abs().amax(dim=1) / expected.abs().max()
    same = int((off <= 1e-3).sum())  # not for NaN
    if same < math.ceil(0.75 * len(images)):
        raise AssertionError(
            f"the logits of {len(images) - same} of {len(images)} images differ, by up to "
            f"{off.max().item():.2g} of the largest"
        )


def _images(of: Contestant, batch: int, device: torch.device) -> torch.Tensor:
    side = of.model.patch_embed.img_size  # type: ignore[union-attr]
    return torch.randn(batch, 3, *side, device=device)  # type: ignore[misc]


def parse() -> argparse.Namespace:
    parser = benchmark_options.parser(__doc__, GPU_MINUTES)
    parser.add_argument("--batch", type=int, nargs="+", help="default: 1 4 16; on a GPU 1 32 256 320")
    parser.add_argument("--keep-rates", type=float, nargs="+", default=list(KEEP_RATES))
    parser.add_argument(
        "--seconds",
        type=float,
        help="for each group of rows, but at least 5 calls of each (default: 10; --quick 3; on a GPU 5)",
    )
    parser.add_argument(
        "--latency-calls",
        type=int,
        default=LATENCY_CALLS,
        help="of each at least, at batch 1 in inference (default: 100, for the 99th percentile)",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="about 2 minutes on two cores: keep rate 0.7, inference, one batch",
    )
    return benchmark_options.parse(parser, GPU_MINUTES)


def groups(options: argparse.Namespace) -> list[Group]:
    """Return what is measured: all keep rates at the largest batch, else some, compiled one.

    On a GPU in the order in which it tells most: FIRST, the rest without compiling, the rest.
    """
    on_gpu = options.device == "cuda"
    batches = options.batch or ([1, 32, 256, 320] if on_gpu else [1, 4, 16])
    if options.quick and not options.batch:
        batches = [256, 1] if on_gpu else [batches[-2]]
    # On a GPU 320 images are there to see whether another number suits it better.
    largest = 256 if on_gpu and 256 in batches else max(batches) if on_gpu else batches[-1]
    every = tuple(options.keep_rates)
    some = tuple(rate for rate in every if rate in SOME) or every
    one = tuple(rate for rate in every if rate in ONE) or every[:1]
    seconds = options.seconds or (3.0 if options.quick else 5.0 if on_gpu else 10.0)
    found = []
    for precision in ("float32", "bfloat16"):
        # A graph is captured in a second: not to be left out together with what has to be compiled.
        for mode in ("eager", "compile", "cudagraph") if on_gpu else ("eager", "compile"):
            if options.quick and _left_out_of_quick(mode, precision, on_gpu):
                continue
            for batch in batches:
                rates = one if options.quick or mode != "eager" else every if batch == largest else some
                least = max(5, options.latency_calls) if batch == 1 else 5
                found.append(Group("inference", precision, batch, mode, rates, seconds, least))
        if not options.quick:
            found.append(Group("training", precision, largest, "eager", one, seconds, 5))
    return sorted(found, key=lambda group: telling(group, largest)) if on_gpu else found


def _left_out_of_quick(mode: str, precision: str, on_gpu: bool) -> bool:
    """Compiling is what a quick run mostly takes, and on a GPU nothing in float32 comes first."""
    return (mode == "compile" or on_gpu) and precision == ("float32" if on_gpu else "bfloat16")


def telling(group: Group, largest: int) -> tuple[int, bool, bool, bool, int]:
    """Return what sorts a GPU's groups: those of FIRST, the rest without compiling, the rest."""
    key = (group.task, group.mode, group.batch)
    is_first = group.precision == "bfloat16" and key in FIRST
    rank = FIRST.index(key) if is_first else len(FIRST)
    rarely = group.batch not in (1, largest)
    return rank, group.mode == "compile", group.precision == "float32", rarely, -group.batch


def takes_part(entry: Contestant, group: Group) -> bool:
    """Return whether a model is in a group."""
    if entry.name not in ("dense", FASTER) and entry.keep_rate not in group.keep_rates:
        return False
    # A DynamicViT trains by masking, with losses of its own. Neither it nor ToMe is the compiled rival, and
    # prepacking tells on none of these.
    eager_only = entry.name.startswith(("Dynamic", "ToMe")) or entry.name.endswith(PREPACKED)
    return not eager_only or (group.task == "inference" and group.mode == "eager")


def run(group: Group, everyone: list[Contestant], device: torch.device, with_onnx: bool) -> list[Row]:
    """Measure a group."""
    images = _images(everyone[0], group.batch, device)
    models = [entry for entry in everyone if takes_part(entry, group)]
    if with_onnx and (group.task, group.precision, group.mode) == ("inference", "float32", "eager"):
        models += in_onnx_runtime(models, images)
    torch._dynamo.reset()  # of the group before
    precision = choose_precision(device, group.precision)
    rows = measure(models, images, group.task, (group.mode,), precision, group.seconds, group.least)
    # ONNX Runtime keeps its memory between calls, so that what a call adds is not what it needs.
    return [
        replace(row, mode="onnxruntime", peak_memory=None) if row.model.startswith(ONNX) else row
        for row in rows
    ]


def main() -> int:
    options = parse()
    commit()
    device = torch.device(options.device)
    torch.manual_seed(0)
    all_groups = groups(options)
    keep_rates = tuple(sorted({rate for group in all_groups for rate in group.keep_rates}, reverse=True))
    with_onnx = options.device == "cpu" and onnx_rivals.available()
    everyone = field(options.model, keep_rates, device)
    onnxruntime = onnx_rivals.version() if with_onnx else "left out"
    rows: list[Row] = []

    def save(missing: Missing) -> None:
        if options.output:
            write(options, rows, missing, onnxruntime)

    def measure_group(group: Group) -> None:
        rows.extend(run(group, everyone, device, with_onnx))

    missing = in_time(all_groups, measure_group, options.minutes, Group.expected_seconds, save)
    print(f"\n{table(rows)}\n\n{missing}".rstrip("\n"))
    save(missing)
    if options.output:
        draw(options, rows)
    return 1 if missing.failures else 0


def write(options: argparse.Namespace, rows: list[Row], missing: Missing, onnxruntime: str) -> None:
    """OUTPUT.json and OUTPUT.md."""
    options.output.parent.mkdir(parents=True, exist_ok=True)
    facts = {**machine(options.device), "onnxruntime": onnxruntime}
    everything = {"machine": facts, **asdict(missing), "rows": [asdict(row) for row in rows]}
    options.output.with_suffix(".json").write_text(json.dumps(everything, indent=1) + "\n")
    heading = f"# DeiT-{options.model[0].upper()} end to end\n\n"
    heading += "".join(f"- {name}: {fact}\n" for name, fact in facts.items())
    explained = (
        "ms: median of the calls, which take turns. 90 % and 99 %: percentiles, of 10 and 100 calls or more. "
        "MiB: what a call needs at its peak beyond what is there before it. A dash: not measured. "
        "docs/benchmarks.md says what the rows are."
    )
    text = f"{heading}\n{explained}\n\n```\n{table(rows)}\n```\n\n{missing}"
    options.output.with_suffix(".md").write_text(text.rstrip("\n") + "\n")


def draw(options: argparse.Namespace, rows: list[Row]) -> None:
    """OUTPUT.png, where there is something to draw and to draw it with."""
    if importlib.util.find_spec("matplotlib") is None:
        print("no plot: matplotlib is not installed")
    elif not shown_in_plot(rows):
        print("no plot: nothing was measured in eager mode")
    else:
        plot(rows, options.output.with_suffix(".png"), options.device.upper())


if __name__ == "__main__":
    sys.exit(main())
