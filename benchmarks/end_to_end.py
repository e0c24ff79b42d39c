"""Time DeiT-S as an EViT next to what people would use instead.

    python benchmarks/end_to_end.py --output benchmarks/results/end-to-end-cpu
    python benchmarks/end_to_end.py --device cuda --output benchmarks/results/end-to-end-cuda

Instead: timm's dense model; EViT as it is usually written (plain_evit.py); both under torch.compile and, on a
GPU, in CUDA graphs; both in ONNX Runtime on the CPU (onnx_rivals.py); DynamicViT. All take turns, call by
call, on the CPU each in a process of its own, with the same weights where they have the same parameters; the
logits of what should give the same are compared before anything is timed. The median call counts. The plot
shows images per second against the keep rate.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import onnx_rivals
import torch
from operator_times.facts import machine
from plain_evit import PlainEViT

from evit_ext import cpu_overrides
from evit_ext.benchmark import Contestant, Row, contestants, measure
from evit_ext.cli.benchmark import LATENCY_CALLS, table
from evit_ext.families import cpu_forwards
from evit_ext.training.precision import choose_precision

KEEP_RATES = (0.9, 0.8, 0.7, 0.6, 0.5)
SOME = (0.7, 0.5)  # where not all keep rates take part
ONE = (0.7,)  # of what is compiled first, for 10 to 20 seconds each on two cores
ONNX = "ONNX Runtime"
FASTER = "dense, EViT's forwards"


@dataclass(frozen=True)
class Group:
    """What takes turns, and how it is run; `least` calls of each in any case."""

    task: str
    precision: str
    batch: int
    modes: tuple[str, ...]
    keep_rates: tuple[float, ...]
    seconds: float
    least: int

    def __str__(self) -> str:
        return f"{self.task}, {self.precision}, batch {self.batch}, {' and '.join(self.modes)}"


def field(model: str, keep_rates: tuple[float, ...], device: torch.device) -> list[Contestant]:
    """Return the dense model, its EViTs, those in plain PyTorch, and DynamicViTs of the same keep rates."""
    dense, *evits = contestants(f"deit_{model}", keep_rates, device)
    plain = []
    for evit in evits:
        written = PlainEViT(dense.model, evit.keep_rate).to(device).eval()
        _assert_same(written, evit.model, _images(dense, 2, device))
        plain.append(Contestant(f"plain EViT {evit.keep_rate:g}", written, evit.keep_rate, evit.gmacs))
    rivals = contestants(f"dynamicvit_{model}", keep_rates, device)[1:]
    faster = [] if device.type != "cpu" else [_with_faster_forwards(dense)]
    return [dense, *faster, *evits, *plain, *rivals]


def _with_faster_forwards(dense: Contestant) -> Contestant:
    """Return the dense model with the forwards that an EViT's blocks have on the CPU, to tell their part."""
    model: Any = copy.deepcopy(dense.model)
    cpu_overrides.install(model.blocks, cpu_forwards(model))
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
    """Raise AssertionError where the logits are not the same but for rounding."""
    expected = wanted(images)
    torch.testing.assert_close(model(images), expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


def _images(of: Contestant, batch: int, device: torch.device) -> torch.Tensor:
    side = of.model.patch_embed.img_size  # type: ignore[union-attr]
    return torch.randn(batch, 3, *side, device=device)  # type: ignore[misc]


def plot(rows: list[Row], path: Path, device: str) -> None:
    """Draw images per second against the keep rate, of the largest batch, a panel for each precision."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [row for row in rows if row.task == "inference" and row.mode in ("eager", "onnxruntime")]
    batch = max(row.batch for row in shown)
    shown = [row for row in shown if row.batch == batch]
    precisions = list(dict.fromkeys(row.precision for row in shown))
    figure, axes = plt.subplots(1, len(precisions), figsize=(5.5 * len(precisions), 4.5), squeeze=False)
    names = {
        "EViT": "EViT, evit_ext",
        "plain EViT": "EViT, plain PyTorch",
        f"{ONNX} plain EViT": f"EViT, plain, {ONNX}",
        "DynamicViT": "DynamicViT",
    }
    for axis, precision in zip(axes[0], precisions, strict=True):
        here = [row for row in shown if row.precision == precision]
        for dense, style in (("dense", "--"), (f"{ONNX} dense", ":")):
            for row in [row for row in here if row.model == dense]:
                label = f"dense, {ONNX}" if ONNX in dense else "dense, timm"
                axis.axhline(row.images_per_second, color="gray", linestyle=style, label=label)
        for color, (kind, label) in enumerate(names.items()):
            line = [row for row in here if row.model.rpartition(" ")[0] == kind]
            if line:
                axis.plot(
                    [row.keep_rate for row in line],
                    [row.images_per_second for row in line],
                    marker="o",
                    color=f"C{color}",
                    label=label,
                )
        axis.set(
            title=f"{precision}, batch {batch}, {device}", xlabel="keep rate", ylabel="images per second"
        )
        axis.set_ylim(0, 1.1 * max(row.images_per_second for row in here))
        axis.invert_xaxis()
        axis.legend(loc="lower right", fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--output", type=Path, help="write OUTPUT.json, OUTPUT.md and OUTPUT.png as well")
    parser.add_argument("--model", choices=["tiny", "small", "base"], default="small")
    parser.add_argument("--batch", type=int, nargs="+", help="default: 1 4 16; on a GPU 1 8 64 256")
    parser.add_argument("--keep-rates", type=float, nargs="+", default=list(KEEP_RATES))
    parser.add_argument(
        "--seconds",
        type=float,
        help="for each group of rows, but at least 5 calls of each (default: 10, --quick 3)",
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
    return parser.parse_args()


def groups(options: argparse.Namespace) -> list[Group]:
    """Return what is measured: all keep rates at the largest batch, else some, compiled one."""
    on_gpu = options.device == "cuda"
    batches = options.batch or ([1, 8, 64, 256] if on_gpu else [1, 4, 16])
    if options.quick and not options.batch:
        batches = [batches[-2]]
    every = tuple(options.keep_rates)
    some = tuple(rate for rate in every if rate in SOME) or every
    one = tuple(rate for rate in every if rate in ONE) or every[:1]
    seconds = options.seconds or (3.0 if options.quick else 10.0)
    found = []
    for precision in ("float32", "bfloat16"):
        for modes in (("eager",), ("compile", *(["cudagraph"] if on_gpu else []))):
            if options.quick and (precision, modes) == ("bfloat16", ("compile",)):
                continue  # compiling is what a quick run mostly takes
            for batch in batches:
                rates = (
                    one if options.quick or modes != ("eager",) else every if batch == batches[-1] else some
                )
                least = max(5, options.latency_calls) if batch == 1 else 5
                found.append(Group("inference", precision, batch, modes, rates, seconds, least))
        if not options.quick:
            found.append(Group("training", precision, batches[-1], ("eager",), one, seconds, 5))
    return found


def takes_part(entry: Contestant, group: Group) -> bool:
    """Return whether a model is in a group."""
    if entry.name == FASTER:
        return group.task == "inference"  # under autograd it is the dense model
    if entry.name != "dense" and entry.keep_rate not in group.keep_rates:
        return False
    # A DynamicViT trains by masking, with losses of its own; and it is not the compiled rival.
    return not entry.name.startswith("Dynamic") or (group.task == "inference" and group.modes == ("eager",))


def run(group: Group, everyone: list[Contestant], device: torch.device, with_onnx: bool) -> list[Row]:
    """Measure a group."""
    images = _images(everyone[0], group.batch, device)
    models = [entry for entry in everyone if takes_part(entry, group)]
    if with_onnx and (group.task, group.precision, group.modes) == ("inference", "float32", ("eager",)):
        models += in_onnx_runtime(models, images)
    torch._dynamo.reset()  # of the group before
    precision = choose_precision(device, group.precision)
    rows = measure(models, images, group.task, group.modes, precision, group.seconds, group.least)
    # ONNX Runtime keeps its memory between calls, so that what a call adds is not what it needs.
    return [
        replace(row, mode="onnxruntime", peak_memory=None) if row.model.startswith(ONNX) else row
        for row in rows
    ]


def main() -> None:
    options = parse()
    device = torch.device(options.device)
    torch.manual_seed(0)
    all_groups = groups(options)
    keep_rates = tuple(sorted({rate for group in all_groups for rate in group.keep_rates}, reverse=True))
    with_onnx = options.device == "cpu" and onnx_rivals.available()
    everyone = field(options.model, keep_rates, device)
    rows: list[Row] = []
    start = time.perf_counter()
    for number, group in enumerate(all_groups, 1):
        passed = timedelta(seconds=round(time.perf_counter() - start))
        print(f"[{number}/{len(all_groups)}, {passed}] {group}", flush=True)
        rows += run(group, everyone, device, with_onnx)
    print(f"in {timedelta(seconds=round(time.perf_counter() - start))}\n", flush=True)
    text = table(rows)
    print(text)
    if options.output:
        write(options, rows, text, onnx_rivals.version() if with_onnx else "left out")


def write(options: argparse.Namespace, rows: list[Row], text: str, onnxruntime: str) -> None:
    """OUTPUT.json, OUTPUT.md and OUTPUT.png."""
    options.output.parent.mkdir(parents=True, exist_ok=True)
    facts = {**machine(options.device), "onnxruntime": onnxruntime}
    everything = {"machine": facts, "rows": [asdict(row) for row in rows]}
    options.output.with_suffix(".json").write_text(json.dumps(everything, indent=1) + "\n")
    heading = f"# DeiT-{options.model[0].upper()} end to end\n\n"
    heading += "".join(f"- {name}: {fact}\n" for name, fact in facts.items())
    explained = (
        "ms: median of the calls, which take turns. 90 % and 99 %: percentiles, of 10 and 100 calls or more. "
        "MiB: what a call needs at its peak beyond what is there before it. A dash: not measured. "
        "docs/benchmarks.md says what the rows are."
    )
    options.output.with_suffix(".md").write_text(f"{heading}\n{explained}\n\n```\n{text}\n```\n")
    plot(rows, options.output.with_suffix(".png"), options.device.upper())


if __name__ == "__main__":
    main()
