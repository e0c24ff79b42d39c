"""Train DeiT-S on a GPU for some minutes: dense, as an EViT with the CUDA kernels, and with their reference.

    python benchmarks/gpu_training.py --output benchmarks/results/training-cuda

On digits among clutter at 224x224, with the package's own trainer, in bfloat16 autocast. All runs begin with
the same weights and see the same batches in the same order; a round of steps of one is followed by the same
round of the next, so that they can be compared wherever time runs out. The reference is what the operators
compute in PyTorch's own operators where there is no kernel. Two trainings that differ by rounding alone drift
apart: a fourth run, with the kernels and weights off by a millionth, says how far, and the kernels' run may
differ from the reference's by no more than three times that.

Steps are timed before, in turns, on one batch that lies on the device: no data is loaded.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import copy
import importlib.util
import json
import math
import multiprocessing
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import gpu_training_report as report
import timm.optim
import torch
from gpu_training_report import DENSE, KERNELS, REFERENCE, TWIN
from operator_times.facts import machine
from time_limit import TimeLimit, write_whole
from torch import Tensor, nn

from evit_ext.benchmark import Contestant, measure
from evit_ext.data import ClutteredDigits, denormalize
from evit_ext.data.digits import MEAN, STD
from evit_ext.models.by_name import create_dense, create_evit
from evit_ext.ops import library
from evit_ext.training.evaluation import evaluate
from evit_ext.training.precision import Precision, choose_precision
from evit_ext.training.recipe import Recipe
from evit_ext.training.trainer import Trainer

KEEP_RATE = 0.7
TWIN_DIFFERENCE = 1e-6  # relative, of each weight
MAX_ROUNDS = 60
#: Of the time that steps took alone, what a round takes: batches are made, gradients measured, and the
#: optimizer is another. An estimate, and rather too large: a schedule that is cut off does not reach its end.
ROUND_OVERHEAD = 1.5


@dataclass(frozen=True)
class Setup:
    """What is trained, on what."""

    model: str = "deit_small"
    model_args: dict[str, Any] = field(default_factory=dict)
    img_size: int = 224
    batch: int = 256
    train_images: int = 20_480
    test_images: int = 2_048
    steps_in_round: int = 25
    optimizer: str | None = None  # muon where timm has it, else adamw
    lr: float = 5e-3  # of muon, half of what the recipe cluttered-digits has for a smaller model
    adamw_lr: float = 5e-4
    device: str = "cuda"
    precision: str = "auto"
    processes: int = 1
    seconds: float = 5.0  # for the times of steps


@dataclass
class Images:
    """Canvases [n, S, S], uint8, and labels, int64 [n], on the device."""

    canvases: Tensor
    labels: Tensor

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return images float32 [B, 3, S, S], normalized, and labels [B]."""
        gray = self.canvases[index].float().div_(255).sub_(MEAN).div_(STD)
        return gray.unsqueeze(1).expand(-1, 3, -1, -1).contiguous(), self.labels[index]


def _render(split: str, size: int, img_size: int, start: int, end: int) -> tuple[Any, Any]:
    digits = ClutteredDigits(split, img_size, size)
    images, labels, _ = digits.render(range(start, end))
    return denormalize(images).mul(255).round().to(torch.uint8).numpy(), labels.numpy()


def render(split: str, size: int, setup: Setup) -> Images:
    """Draw the images of a split, in several processes, and put them on the device."""
    parts = [(start, min(size, start + 256)) for start in range(0, size, 256)]
    if setup.processes == 1:
        drawn = [_render(split, size, setup.img_size, *part) for part in parts]
    else:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["__main__", "evit_ext.data"])
        with concurrent.futures.ProcessPoolExecutor(setup.processes, context) as pool:
            waiting = [pool.submit(_render, split, size, setup.img_size, *part) for part in parts]
            drawn = [part.result() for part in waiting]
    canvases = torch.cat([torch.from_numpy(canvas) for canvas, _ in drawn]).to(setup.device)
    return Images(canvases, torch.cat([torch.from_numpy(labels) for _, labels in drawn]).to(setup.device))


@contextmanager
def operators(run: str) -> Iterator[None]:
    """Have the operators run their reference on every device, if the run is that of the reference."""
    before = library.KERNEL_DEVICES
    if run == REFERENCE:
        library.KERNEL_DEVICES = frozenset({"meta"})  # type: ignore[misc]
    try:
        yield
    finally:
        library.KERNEL_DEVICES = before  # type: ignore[misc]


class WithOperators(nn.Module):
    """A model that runs with the operators of a run; its backward follows from what ran forward."""

    def __init__(self, run: str, model: nn.Module) -> None:
        super().__init__()
        self.run, self.model = run, model

    def forward(self, images: Tensor) -> Tensor:
        with operators(self.run):
            logits: Tensor = self.model(images)
        return logits


def make_models(setup: Setup) -> dict[str, nn.Module]:
    """Return the models of all runs, with the same weights but for the twin's."""
    torch.manual_seed(0)
    given = {"num_classes": 10, "img_size": setup.img_size, **setup.model_args}
    dense = create_dense(setup.model, **given)
    models: dict[str, nn.Module] = {DENSE: dense}
    for run in (KERNELS, REFERENCE, TWIN):
        models[run] = create_evit(setup.model, keep_rate=KEEP_RATE, **given)
        models[run].load_state_dict(dense.state_dict())
    with torch.no_grad():
        for parameter in models[TWIN].parameters():
            parameter.mul_(1 + TWIN_DIFFERENCE * torch.randn_like(parameter))
    return {run: model.to(setup.device) for run, model in models.items()}


def time_steps(
    models: dict[str, nn.Module], images: Tensor, precision: Precision, seconds: float
) -> list[dict[str, Any]]:
    """Return a row for a training step of each model; the models stay as they are."""
    entries = [
        Contestant(run, WithOperators(run, copy.deepcopy(models[run])), 1.0, None)
        for run in (DENSE, KERNELS, REFERENCE)
    ]
    rows = measure(entries, images, "training", ("eager",), precision, seconds, apart=False)
    keys = ("model", "milliseconds", "images_per_second", "calls", "peak_memory")
    return [{key: asdict(row)[key] for key in keys} for row in rows]


def train(
    setup: Setup, limit: TimeLimit, results: dict[str, Any], rounds: int | None = None
) -> Iterator[dict[str, Any]]:
    """Train all runs; yield the results, which grow, whenever there is something new in them.

    Args:
        setup: see :class:`Setup`.
        limit: of time, in which as many rounds are planned as fit.
        results: is filled: "steps", of which each run has its time; "losses" and "grad_norms" of each run,
            step by step; "rounds" planned and done; "test" accuracy and loss of each run.
        rounds: that are made instead.
    """
    device = torch.device(setup.device)
    precision = choose_precision(device, setup.precision)
    images, test = (
        render(split, size, setup)
        for split, size in (("train", setup.train_images), ("test", setup.test_images))
    )
    print(f"[{limit.clock}] {len(images.labels)} images to train on", flush=True)
    models = make_models(setup)
    batch, _ = images.batch(torch.arange(setup.batch, device=device))
    results |= {"setup": asdict(setup), "precision": str(precision), "left_out": [], "failures": []}
    results["steps"] = time_steps(models, batch, precision, setup.seconds)
    yield results
    milliseconds = {row["model"]: row["milliseconds"] for row in results["steps"]}
    a_round = (
        ROUND_OVERHEAD * setup.steps_in_round * (sum(milliseconds.values()) + milliseconds[KERNELS]) / 1e3
    )
    reserve = 0.1 * min(limit.left, 300.0)  # for the evaluation and the plot
    planned = rounds or max(2, min(MAX_ROUNDS, math.floor((limit.left - reserve) / a_round)))
    # As in the recipe cluttered-digits; timm has muon since 1.0.22. AdamW learns nothing in so few steps.
    muon = (setup.optimizer or "muon") == "muon" and "muon" in timm.optim.list_optimizers()
    recipe = Recipe(
        epochs=planned,
        batch_size=setup.batch,
        optimizer="muon" if muon else "adamw",
        lr=setup.lr if muon else setup.adamw_lr,
        min_lr=0.0,
        warmup_epochs=min(4.0, planned / 4),
    )
    trainers = {
        run: Trainer(model, recipe, setup.steps_in_round, precision=precision)
        for run, model in models.items()
    }
    results |= {"planned_rounds": planned, "rounds": 0, "recipe": recipe.optimisation()}
    results |= {name: {run: [] for run in models} for name in ("losses", "grad_norms")}
    for number in range(planned):
        if reason := limit.reason_against("round", a_round, reserve):
            results["left_out"].append(f"rounds {number + 1} to {planned}: {reason}")
            break
        start = limit.passed
        try:
            for run, trainer in trainers.items():
                _train_round(run, trainer, images, setup, number, results)
        except FloatingPointError as error:
            results["failures"].append(f"{run}, round {number + 1}: {error}")
            yield results
            return
        limit.took("round", limit.passed - start)
        results["rounds"] = number + 1
        losses = ", ".join(f"{run} {report.round_losses(results, run)[-1]:.3f}" for run in models)
        print(f"[{limit.clock}] round {number + 1} of {planned}: {losses}", flush=True)
        yield results
    results["test"] = {}
    places = torch.arange(len(test.labels), device=device).split(setup.batch)
    for run, model in models.items():
        with operators(run):
            found = evaluate(model, (test.batch(index) for index in places), precision)
        results["test"][run] = {"top1": found.top1, "loss": found.loss, "images": found.images}
    yield results


def _train_round(
    run: str, trainer: Trainer, images: Images, setup: Setup, number: int, results: dict[str, Any]
) -> None:
    """Train one run for a round, on batches that follow from the round's number; note what its steps gave."""
    generator = torch.Generator().manual_seed(number)
    order = torch.randperm(len(images.labels), generator=generator).to(setup.device)
    count = setup.steps_in_round
    # A round may have more images than there are: then from the beginning again.
    index = order.repeat(math.ceil(count * setup.batch / len(order)))[: count * setup.batch]
    seen: list[tuple[Tensor, Tensor]] = []

    def note() -> None:
        assert trainer.last is not None
        seen.append((trainer.last.loss, trainer.last.grad_norm))

    with operators(run):
        batches = (images.batch(part) for part in index.split(setup.batch))
        trainer.train_one_epoch(batches, progress=False, after_step=note)
    # Read here and not step by step, which would wait for the GPU each time.
    results["losses"][run] += [loss.item() for loss, _ in seen]
    results["grad_norms"][run] += [norm.item() for _, norm in seen]


def write(output: Path, facts: dict[str, Any], results: dict[str, Any]) -> None:
    """OUTPUT.json and OUTPUT.md."""
    output.parent.mkdir(parents=True, exist_ok=True)
    found = [asdict(target) for target in report.targets(results)]
    contents = {"machine": facts, "targets": found, **results}
    write_whole(output.with_suffix(".json"), json.dumps(contents, indent=1) + "\n")
    heading = "# Training on a GPU\n\n" if "gpu" in facts else "# Training\n\n"
    heading += "".join(f"- {name}: {fact}\n" for name, fact in facts.items())
    write_whole(output.with_suffix(".md"), f"{heading}\n{report.text(results)}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--output", type=Path, help="write OUTPUT.json, OUTPUT.md and OUTPUT.png as well")
    parser.add_argument("--minutes", type=float, default=4.5, help="for everything (default: 4.5)")
    parser.add_argument(
        "--model", default="deit_small", help="of evit_ext.models or timm's (default: deit_small)"
    )
    parser.add_argument("--img-size", type=int, default=224, help="side of the canvas (default: 224)")
    parser.add_argument("--batch", type=int, default=256, help="images of a step (default: 256)")
    parser.add_argument(
        "--lr",
        type=float,
        help=f"peak learning rate (default: {Setup.lr:g} of muon, {Setup.adamw_lr:g} of adamw)",
    )
    parser.add_argument("--optimizer", choices=["muon", "adamw"], help="(default: muon, where timm has it)")
    parser.add_argument(
        "--precision", choices=["auto", "float32", "bfloat16"], default="auto", help="(default: auto)"
    )
    options = parser.parse_args()
    for name in ("minutes", "img_size", "batch", "lr"):
        if getattr(options, name) is not None and not getattr(options, name) > 0:
            parser.error(f"--{name.replace('_', '-')} must be positive, got {getattr(options, name):g}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU: torch.cuda.is_available() is False")
    if options.device == "cuda" and "cuda" not in library.KERNEL_DEVICES:
        parser.error("evit_ext was built without CUDA operators: there is nothing to compare")
    return options


def setup_of(options: argparse.Namespace) -> Setup:
    """Return what is trained, by the options."""
    names = ("model", "img_size", "batch", "device", "precision", "optimizer")
    setup = Setup(processes=len(os.sched_getaffinity(0)), **{name: getattr(options, name) for name in names})
    return replace(setup, lr=options.lr, adamw_lr=options.lr) if options.lr else setup


def main() -> int:
    options = parse()
    limit = TimeLimit(options.minutes)
    setup = setup_of(options)
    # Each process that draws has a core; of this one, these have been read.
    os.environ |= {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    facts = machine(options.device)
    results: dict[str, Any] = {}
    for so_far in train(setup, limit, results):
        if options.output:
            write(options.output, facts, so_far)
    if options.output and importlib.util.find_spec("matplotlib") is None:
        print("no plot: matplotlib is not installed")
    elif options.output and results.get("rounds"):
        report.plot(results, options.output.with_suffix(".png"))
    print(f"\n{report.text(results)}in {limit.clock}")
    return 1 if results["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
