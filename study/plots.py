"""Plots of a study: accuracy against cost, and loss against epochs."""

from __future__ import annotations

import math
import statistics
from pathlib import Path

from evit_ext._util.files import replacing_path
from study.plan import Plan, Question
from study.results import Results
from study.statistics import estimate


def draw_question(plan: Plan, results: Results, question: Question, path: Path) -> None:
    """Draw the arms of a question into an SVG file: each run a dot, each arm its mean and interval."""
    import matplotlib

    matplotlib.use("agg")
    matplotlib.rcParams["svg.hashsalt"] = "study"  # the same results make the same file
    matplotlib.rcParams["svg.fonttype"] = "none"  # text, not the outlines of its letters
    from matplotlib import pyplot

    figure, (accuracy, loss) = pyplot.subplots(1, 2, figsize=(11, 5), layout="constrained")
    colours = pyplot.get_cmap("tab20")
    ran = {name: found for name in question.arms if (found := list(results.of(name).values()))}
    places = _side_by_side({name: found[0]["gmacs"] for name, found in ran.items()})
    for number, (name, found) in enumerate(ran.items()):
        colour = colours(number % colours.N)
        macs, values = places[name], [result["top1"] for result in found]
        accuracy.scatter([macs] * len(values), values, s=10, color=colour, alpha=0.5, linewidths=0)
        mean = estimate(values)
        half = 0.0 if math.isinf(mean.low) else mean.mean - mean.low
        accuracy.errorbar([macs], [mean.mean], yerr=[half], color=colour, marker="o", capsize=4, label=name)
        losses = [result["losses"] for result in found if result["losses"]]
        if losses:
            curve = [statistics.fmean(values) for values in zip(*losses, strict=True)]
            loss.plot(range(1, len(curve) + 1), curve, color=colour, marker=".", label=name)
    everything = [result["top1"] for found in ran.values() for result in found]
    if everything:  # intervals of two runs may reach far beyond
        margin = 1 + 0.1 * (max(everything) - min(everything))
        accuracy.set_ylim(min(everything) - margin, max(everything) + margin)
    accuracy.set_xlabel("GMACs an image (arms that cost the same are drawn side by side)")
    accuracy.set_ylabel("top-1, %")
    loss.set_xlabel("epoch")
    loss.xaxis.get_major_locator().set_params(integer=True)
    loss.set_ylabel("training loss, mean of the runs")
    for axes in (accuracy, loss):
        axes.grid(alpha=0.3)
    if ran:  # below both, where it hides nothing
        figure.legend(
            *accuracy.get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize="small"
        )
    with replacing_path(path) as file:
        figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)


def _side_by_side(costs: dict[str, float]) -> dict[str, float]:
    """Return where to draw each arm: at its cost, moved a little where others cost nearly as much."""
    step = 0.012 * ((max(costs.values()) - min(costs.values())) or 1) if costs else 0.0
    places: dict[str, float] = {}
    for name, cost in sorted(costs.items(), key=lambda item: item[1]):
        before = max(places.values(), default=-math.inf)
        places[name] = max(cost, before + step)
    return places
