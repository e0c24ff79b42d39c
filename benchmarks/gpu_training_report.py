"""What gpu_training.py found: judged, as text, and drawn."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from operator_times.report import Target, targets_table, verdict
from time_limit import left_out_lines

DENSE, KERNELS, REFERENCE, TWIN = "dense", "EViT, kernels", "EViT, reference", "EViT, kernels, twin"
TIMES_DENSE = 1.4
#: Relative difference of the first step's loss and gradient, which come from the same weights and batch: only
#: rounding differs, and which patches it picks among those with all but the same score.
FIRST_LOSS, FIRST_GRADIENT = 0.01, 0.05
#: The curves of kernels and reference may be so many times as far apart as those of kernels and twin: on the
#: CPU, with a small model, 160 steps and operators that are known to be right, it was 1.8 times. This share
#: of the loss is always allowed, should the twin be close by chance.
TIMES_TWIN, FLOOR = 3.0, 0.02
#: Curves that agree say little before anything was learned: the last round's loss, of the first's, at most.
LEARNED = 0.5
#: Accuracies may differ by so many standard errors of the difference of two shares.
STANDARD_ERRORS = 3.0

Results = dict[str, Any]


def round_losses(results: Results, run: str) -> list[float]:
    """Return the mean loss of each whole round."""
    losses, length = results["losses"][run], results["setup"]["steps_in_round"]
    return [sum(losses[i : i + length]) / length for i in range(0, len(losses) - length + 1, length)]


def distance(results: Results, run: str, other: str) -> float | None:
    """Return how far apart two curves are: the mean of the difference of the rounds' losses, in nats."""
    pairs = list(zip(round_losses(results, run), round_losses(results, other), strict=False))
    return sum(abs(a - b) for a, b in pairs) / len(pairs) if pairs else None


def targets(results: Results) -> list[Target]:
    """Return what was aimed at, with what was found; None where it is not known yet."""
    return [
        _faster(results),
        *_first_step(results),
        _learned(results),
        _curves(results),
        _accuracy(results),
    ]


def _faster(results: Results) -> Target:
    taken = {row["model"]: row["milliseconds"] for row in results.get("steps", [])}
    name, wanted = "a step of the EViT over the dense model's", f"≥ {TIMES_DENSE:g} times"
    if not {DENSE, KERNELS} <= set(taken):
        return Target(name, wanted, "not measured", None)
    times = taken[DENSE] / taken[KERNELS]
    return Target(name, wanted, f"{times:.2f} times", times >= TIMES_DENSE)


def _first_step(results: Results) -> list[Target]:
    found = []
    for key, what, bound in (
        ("losses", "loss", FIRST_LOSS),
        ("grad_norms", "norm of the gradient", FIRST_GRADIENT),
    ):
        name, wanted = f"first step, {what}: kernels and reference", f"within {bound:.0%}"
        ours, theirs = (results.get(key, {}).get(run) for run in (KERNELS, REFERENCE))
        if not ours or not theirs:
            found.append(Target(name, wanted, "not measured", None))
            continue
        off = abs(ours[0] - theirs[0]) / abs(theirs[0])
        found.append(Target(name, wanted, f"{ours[0]:.4g} and {theirs[0]:.4g}, {off:.2%}", off <= bound))
    return found


def _learned(results: Results) -> Target:
    name, wanted = "last round's loss of the kernels' run, of the first's", f"≤ {LEARNED:.0%}"
    losses = round_losses(results, KERNELS) if results.get("losses") else []
    if len(losses) < 2:
        return Target(name, wanted, "not measured", None)
    left = losses[-1] / losses[0]
    return Target(name, wanted, f"{left:.0%}", left <= LEARNED)


def _curves(results: Results) -> Target:
    name = "loss curves of kernels and reference, mean distance of rounds"
    wanted = f"≤ {TIMES_TWIN:g} times that of kernels and twin"
    known = "losses" in results
    apart = distance(results, KERNELS, REFERENCE) if known else None
    noise = distance(results, KERNELS, TWIN) if known else None
    if apart is None or noise is None:
        return Target(name, wanted, "not measured", None)
    rounds = round_losses(results, REFERENCE)
    bound = max(TIMES_TWIN * noise, FLOOR * sum(rounds) / len(rounds))
    return Target(name, wanted, f"{apart:.4f} nats; twin {noise:.4f}", apart <= bound)


def _accuracy(results: Results) -> Target:
    name = "accuracy on test images, kernels and reference"
    test = results.get("test", {})
    if not {KERNELS, REFERENCE} <= set(test):
        return Target(name, f"within {STANDARD_ERRORS:g} standard errors", "not measured", None)
    ours, theirs, count = test[KERNELS]["top1"], test[REFERENCE]["top1"], test[KERNELS]["images"]
    share = (ours + theirs) / 200
    error = 100 * math.sqrt(max(share * (1 - share), 1 / count) * 2 / count)
    bound = STANDARD_ERRORS * error
    text = f"{ours:.2f} % and {theirs:.2f} %"
    return Target(name, f"within {bound:.2f} points", text, abs(ours - theirs) <= bound)


def text(results: Results) -> str:
    """Return all of it in Markdown, the verdict last."""
    setup = results["setup"]
    lines = [
        f"{setup['model']} on digits among clutter, {setup['img_size']} pixels, batch {setup['batch']}, "
        f"{results['precision']}, keep rate 0.7 from the first step; optimizer {_optimizer(results)}.\n",
        "| run | step: ms | images/s | MiB | first loss | last round's loss | test loss | test accuracy |",
        "|" + "---|" * 8,
    ]
    rows = {row["model"]: row for row in results["steps"]}
    for run in (DENSE, KERNELS, REFERENCE, TWIN):
        row = rows.get(run, {})
        memory = row.get("peak_memory")
        losses = results.get("losses", {}).get(run, [])
        rounds = round_losses(results, run) if losses else []
        test = results.get("test", {}).get(run, {})
        cells = [run, _cell(row.get("milliseconds"), ".1f"), _cell(row.get("images_per_second"), ".0f")]
        cells += [_cell(memory and memory / 2**20, ".0f"), _cell(losses[0] if losses else None, ".4f")]
        cells += [_cell(rounds[-1] if rounds else None, ".4f"), _cell(test.get("loss"), ".4f")]
        cells += [_cell(test.get("top1"), ".2f")]
        lines.append("| " + " | ".join(cells) + " |")
    done = results.get("rounds", 0) * setup["steps_in_round"]
    found = targets(results)
    judged = (
        f"{done} steps of each run, in rounds of {setup['steps_in_round']}. Before, steps were timed alone, "
        "with AdamW, in turns,\non a batch on the device. The twin is the run with the kernels once more, "
        "from weights that are off by a millionth:\nhow far it drifts is the noise that the reference is "
        f"held against, and should the twin be close by chance, {FLOOR:.0%} of\nthe loss is allowed. "
        f"Accuracies may differ by {STANDARD_ERRORS:g} standard errors.\n"
    )
    said = left_out_lines(results["left_out"], results["failures"]).replace("\n", "\n\n")
    return "\n".join(lines) + f"\n\n{judged}\n{targets_table(found)}\n{said}{verdict(found)}\n"


def _optimizer(results: Results) -> str:
    recipe = results.get("recipe")
    return f"{recipe['optimizer']}, learning rate {recipe['lr']:g}" if recipe else "not chosen yet"


def _cell(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def plot(results: Results, path: Path) -> None:
    """Draw the rounds' losses of all runs, and how far kernels and reference are apart next to the twin."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    length = results["setup"]["steps_in_round"]
    styles = {DENSE: ("gray", "-"), KERNELS: ("C0", "-"), REFERENCE: ("C1", "--"), TWIN: ("C2", ":")}
    figure, (curves, apart) = plt.subplots(1, 2, figsize=(12, 4.5))
    for run, (color, line) in styles.items():
        losses = round_losses(results, run)
        steps = [length * (number + 1) for number in range(len(losses))]
        curves.plot(steps, losses, color=color, linestyle=line, label=run)
    ours = round_losses(results, KERNELS)
    for run, label in ((REFERENCE, "reference"), (TWIN, "twin: noise")):
        others = round_losses(results, run)
        off = [abs(a - b) for a, b in zip(ours, others, strict=False)]
        steps = [length * (number + 1) for number in range(len(off))]
        apart.plot(steps, off, color=styles[run][0], linestyle=styles[run][1], label=f"to the {label}")
    curves.set(title=f"loss, mean of {length} steps", xlabel="step", ylabel="cross-entropy, nats")
    apart.set(title="distance from the run with the kernels", xlabel="step", ylabel="nats")
    for axis in (curves, apart):
        axis.grid(alpha=0.3)
        axis.set_ylim(bottom=0)
        axis.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
