"""The page with the answers: written from the results, never by hand."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from evit_ext._util.files import replacing
from study.plan import Comparison, Plan, Question
from study.plots import draw_question
from study.results import Results
from study.speed import network_of, read_speed
from study.statistics import CONFIDENCE, difference, estimate, verdict

#: What the values of results are called, and their units.
_VALUES = {"top1": ("top-1", "points"), "loss": ("test loss", "nats")}


def write_page(plan: Plan, results: Results, path: Path) -> None:
    """Write the page, and a plot for each question into a folder of its name beside it."""
    pictures = path.with_suffix("")
    pictures.mkdir(parents=True, exist_ok=True)
    for key, question in plan.questions.items():
        results.check_precision({*question.arms, *(c.arm for c in question.comparisons)})
        draw_question(plan, results, question, pictures / f"{key}.svg")
    with replacing(path) as file:
        file.write("\n".join(_page(plan, results, pictures.name)) + "\n")


def _page(plan: Plan, results: Results, pictures: str) -> Iterator[str]:
    task, network = plan.task, plan.network
    patches = (task.canvas_size // task.patch_size) ** 2
    runs = sum(len(results.of(name)) for name in plan.arms)
    planned = sum(arm.seeds for arm in plan.arms.values())
    yield "# Study: the paper's questions"
    yield ""
    yield (
        f"Written by `python -m study page` from `study/{_plan_file(plan)}` and the results beside it: "
        f"**{runs} of {planned} runs** so far. A vision transformer of {network.depth} blocks and "
        f"{network.embed_dim} channels is trained on cluttered digits of {task.canvas_size} × "
        f"{task.canvas_size} pixels, {patches} patches, and tested on {task.test_images:,} canvases that no "
        f"run trains on, the same for all.{_easy(task.easy_epochs)} Runs of two arms with the same seed "
        "begin with the same weights and see the same images, so differences are taken seed by seed. "
        f"Intervals are those of Student's t over the seeds, at {CONFIDENCE * 100:.0f} %: they say how much "
        "another seed may change, not how much other images may. Hypotheses and margins were written into "
        "the plan before the runs. With so many comparisons, about one in twenty shows a difference by "
        "chance."
    )
    speed = read_speed(plan, results.speed)
    if speed:
        yield ""
        yield (
            f"Images a second are of inference on {speed['processor']}, {_threads(speed)}batches of "
            f"{speed['batch']}, in {speed['precision']}, the networks of a canvas size in turns. On a CPU "
            "they are not due to fewer patches alone: blocks of an EViT run in a way of their own there "
            "([how](kernels.md#the-blocks-around-it)), those of the dense network in timm's."
        )
    for question in plan.questions.values():
        yield ""
        yield from _question(plan, results, question, pictures, speed.get("images_per_second", {}))
    if plan.dropped:
        yield ""
        yield "## Tried and dropped"
        yield ""
        yield from (f"- {line}" for line in plan.dropped)
    yield ""
    yield "## Again"
    yield ""
    yield "```sh"
    command = f"python -m study --plan study/{_plan_file(plan)}"
    if plan.name == "plan":
        yield "make study ARGS='--minutes 60'   # runs what has no result yet"
        yield "make study-page                  # writes this page"
    else:
        yield f"{command} run --minutes 60   # runs what has no result yet"
        yield f"{command} page               # writes this page"
    yield f"{command} speed              # measures images a second"
    yield "```"


def page_name(plan: Plan) -> str:
    """Return what the page of a plan is called."""
    return "study" if plan.name == "plan" else f"study-{plan.name}"


def _threads(speed: dict[str, Any]) -> str:
    return "" if speed["threads"] is None else f"{speed['threads']} threads, "


def _easy(epochs: int) -> str:
    if epochs == 0:
        return ""
    first = "epoch" if epochs == 1 else f"{epochs} epochs"
    return f" Networks from scratch see canvases without clutter in the first {first}, all arms alike."


def _plan_file(plan: Plan) -> str:
    return f"{plan.name}.yaml"


def _question(
    plan: Plan, results: Results, question: Question, pictures: str, speed: dict[str, float]
) -> Iterator[str]:
    key = next(name for name, one in plan.questions.items() if one is question)
    yield f"## {question.title}"
    yield ""
    yield question.ask
    yield ""
    yield f"*Expected before the runs:* {question.hypothesis}"
    yield ""
    for what, text in (("Answer", question.answer), ("The paper", question.paper)):
        if text:
            yield f"**{what}:** {question.filled(text, lambda comparison: _found(results, comparison))}"
            yield ""
    for comparison in question.comparisons:
        yield f"- {_sentence(results, comparison)}"
    yield ""
    yield f"![{question.title}]({pictures}/{key}.svg)"
    yield ""
    yield "| arm | runs | top-1 % | test loss | GMACs | images/s | the digit's patches kept, stage by stage |"
    yield "|---|---|---|---|---|---|---|"
    for name in question.arms:
        yield _row(results, name, speed.get(network_of(plan.arms[name])))


def _sentence(results: Results, comparison: Comparison) -> str:
    what, _ = _VALUES.get(comparison.value, (comparison.value, ""))
    found = _found(results, comparison)
    return f"**{comparison.arm}** against **{comparison.with_arm}**, {what}: {found}."


def _found(results: Results, comparison: Comparison) -> str:
    """Return a comparison's verdict and interval."""
    one, other = (
        {seed: result[comparison.value] for seed, result in results.of(name).items()}
        for name in (comparison.arm, comparison.with_arm)
    )
    found = difference(one, other)
    if found.runs == 0:
        return "not run yet"
    _, unit = _VALUES.get(comparison.value, ("", ""))
    said = verdict(found, comparison.margin)
    interval = f"{found.mean:+.2f}"
    if found.runs > 1:
        interval += f" [{found.low:+.2f}, {found.high:+.2f}]"
    return f"{said} ({interval} {unit}, {found.runs} pair{'s' if found.runs > 1 else ''} of runs)"


def _row(results: Results, name: str, images_per_second: float | None) -> str:
    found = results.of(name)
    speed = "not measured" if images_per_second is None else f"{images_per_second:,.0f}"
    if not found:
        return f"| {name} | 0 | not run | | | {speed} | |"
    values = list(found.values())
    top1, loss = (estimate([value[entry] for value in values]) for entry in ("top1", "loss"))
    stages = list(zip(*(value.get("object_patches_kept", []) for value in values), strict=True))
    kept = " · ".join(f"{100 * estimate(stage).mean:.0f} %" for stage in stages)
    spread = f" [{top1.low:.2f}, {top1.high:.2f}]" if len(values) > 1 else ""
    return (
        f"| {name} | {len(values)} | {top1.mean:.2f}{spread} | {loss.mean:.3f} | {values[0]['gmacs']:.4f} | "
        f"{speed} | {kept} |"
    )
