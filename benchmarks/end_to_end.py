"""Time DeiT-S as an EViT next to what people would use instead: dense, DynamicViT, EViT as usually written.

    python benchmarks/end_to_end.py --output benchmarks/results/end-to-end-cpu
    python benchmarks/end_to_end.py --device cuda --output benchmarks/results/end-to-end-cuda

All take turns, call by call, with the same weights where they have the same parameters; the logits of the
EViT as usually written (plain_evit.py) are compared with ours before anything is timed. The median call
counts. The plot shows images per second against the keep rate.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from operator_times.facts import machine
from plain_evit import PlainEViT

from evit_ext.benchmark import Contestant, Row, contestants, measure
from evit_ext.cli.benchmark import table
from evit_ext.training.precision import Precision, choose_precision
from evit_ext.training.progress import Progress

KEEP_RATES = (0.9, 0.8, 0.7, 0.6, 0.5)


def field(model: str, keep_rates: tuple[float, ...], device: torch.device) -> list[Contestant]:
    """Return the dense model, its EViTs, those in plain PyTorch, and DynamicViTs of the same keep rates."""
    dense, *evits = contestants(f"deit_{model}", keep_rates, device)
    plain = []
    for evit in evits:
        written = PlainEViT(dense.model, evit.keep_rate).to(device)
        _assert_same(evit.model, written, device)
        plain.append(Contestant(f"plain EViT {evit.keep_rate:g}", written, evit.keep_rate, evit.gmacs))
    rivals = contestants(f"dynamicvit_{model}", keep_rates, device)[1:]
    return [dense, *evits, *plain, *rivals]


@torch.inference_mode()
def _assert_same(ours: Any, theirs: Any, device: torch.device) -> None:
    images = torch.randn(2, 3, *ours.patch_embed.img_size, device=device)
    expected = theirs.eval()(images)
    torch.testing.assert_close(
        ours.eval()(images), expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item()
    )


def plot(rows: list[Row], path: Path, device: str) -> None:
    """Draw images per second against the keep rate, of the largest batch, a panel for each precision."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [row for row in rows if row.task == "inference" and row.mode == "eager"]
    batch = max(row.batch for row in shown)
    shown = [row for row in shown if row.batch == batch]
    precisions = list(dict.fromkeys(row.precision for row in shown))
    figure, axes = plt.subplots(1, len(precisions), figsize=(5 * len(precisions), 4), squeeze=False)
    for axis, precision in zip(axes[0], precisions, strict=True):
        here = [row for row in shown if row.precision == precision]
        dense = next(row for row in here if row.model == "dense")
        axis.axhline(dense.images_per_second, color="gray", linestyle="--", label="dense")
        for kind in ("EViT", "plain EViT", "DynamicViT"):
            line = [row for row in here if row.model.rpartition(" ")[0] == kind]
            axis.plot(
                [row.keep_rate for row in line],
                [row.images_per_second for row in line],
                marker="o",
                label={"EViT": "EViT, evit_ext", "plain EViT": "EViT, plain PyTorch"}.get(kind, kind),
            )
        axis.set(
            title=f"{precision}, batch {batch}, {device}", xlabel="keep rate", ylabel="images per second"
        )
        axis.set_ylim(0, 1.1 * max(row.images_per_second for row in here))
        axis.invert_xaxis()
        axis.legend()
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
    parser.add_argument("--seconds", type=float, default=20.0, help="for each group of rows (default: 20)")
    parser.add_argument("--keep-rates", type=float, nargs="+", default=list(KEEP_RATES))
    parser.add_argument("--quick", action="store_true", help="keep rate 0.7, the largest batch, no training")
    return parser.parse_args()


def groups(options: argparse.Namespace) -> list[tuple[str, Precision, int, list[str], bool]]:
    """Return task, precision, batch, modes, and whether all keep rates take part."""
    on_gpu = options.device == "cuda"
    batches = options.batch or ([1, 8, 64, 256] if on_gpu else [1, 4, 16])
    batches = batches[-1:] if options.quick else batches
    modes = ["eager", "compile", *(["cudagraph"] if on_gpu else [])]
    found = []
    for name in ("float32", "bfloat16"):
        precision = choose_precision(options.device, name)
        found += [("inference", precision, batch, ["eager"], True) for batch in batches]
        found += [("inference", precision, batch, modes[1:], False) for batch in batches]
        if not options.quick:
            found.append(("training", precision, batches[-1], ["eager"], False))
    return found


def main() -> None:
    options = parse()
    device = torch.device(options.device)
    torch.manual_seed(0)
    keep_rates = (0.7,) if options.quick else tuple(options.keep_rates)
    everyone = field(options.model, keep_rates, device)
    at_half = [entry for entry in everyone if entry.keep_rate in (1.0, 0.7, 0.5)]
    side = everyone[0].model.patch_embed.img_size  # type: ignore[union-attr]
    rows: list[Row] = []
    all_groups = groups(options)
    with Progress("end to end", len(all_groups)) as progress:
        for task, precision, batch, modes, all_rates in all_groups:
            images = torch.randn(batch, 3, *side, device=device)  # type: ignore[misc]
            models = everyone if all_rates else at_half
            if task == "training":  # a DynamicViT trains by masking, with losses of its own
                models = [entry for entry in models if not entry.name.startswith("Dynamic")]
            torch._dynamo.reset()
            rows += measure(models, images, task, modes, precision, options.seconds)
            progress.step(task=task, precision=rows[-1].precision, batch=str(batch), mode=modes[0])
    text = table(rows)
    print(text)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        facts = machine(options.device)
        everything = {"machine": facts, "rows": [asdict(row) for row in rows]}
        options.output.with_suffix(".json").write_text(json.dumps(everything, indent=1) + "\n")
        heading = f"# DeiT-{options.model[0].upper()} end to end\n\n"
        heading += "".join(f"- {name}: {fact}\n" for name, fact in facts.items())
        options.output.with_suffix(".md").write_text(f"{heading}\n```\n{text}\n```\n")
        plot(rows, options.output.with_suffix(".png"), options.device.upper())


if __name__ == "__main__":
    main()
