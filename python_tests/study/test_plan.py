"""Plans: what they say, and what is wrong with them."""

from __future__ import annotations

from pathlib import Path

import pytest

from evit_ext.cost.macs import count_macs
from study.__main__ import HERE
from study.experiment import Experiment
from study.plan import read_plan

PLAN = """
task: {train_images: 64}
network: {embed_dim: 32, depth: 4, num_heads: 2}
recipes: {scratch: {epochs: 1, batch_size: 16, warmup_epochs: 0}}
arms:
  tuned: {start: dense, recipe: scratch, keep_rate: 0.5, seeds: 2}
  dense: {recipe: scratch, seeds: 3}
questions: {}
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "plan.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", ["plan.yaml", "smoke.yaml", "deit-small.yaml"])
def test_plans_that_come_with_it(name: str) -> None:
    plan = read_plan(HERE / name)
    assert list(plan.runs())


def test_the_plan_for_a_gpu_is_of_deit_small() -> None:
    """At equal cost the larger canvas costs what the dense network costs, within a twentieth."""
    plan = read_plan(HERE / "deit-small.yaml")
    macs = {
        name: count_macs(Experiment(plan, name, 0, Path()).build(trained=False)) / 1e9
        for name in ("dense", "evit-0.7", "larger-288")
    }
    assert macs["dense"] == pytest.approx(4.6, abs=0.01) and macs["evit-0.7"] == pytest.approx(3.03, abs=0.01)
    assert macs["larger-288"] == pytest.approx(macs["dense"], rel=0.05)


def test_what_a_run_starts_from_comes_before_it(tmp_path: Path) -> None:
    plan = read_plan(write(tmp_path, PLAN))
    assert list(plan.runs()) == [("dense", 0), ("tuned", 0), ("dense", 1), ("tuned", 1), ("dense", 2)]


def test_settings_are_all_that_a_run_depends_on(tmp_path: Path) -> None:
    before = read_plan(write(tmp_path, PLAN)).settings("tuned")
    assert before["needs"]["dense"]["arm"]["start"] is None
    for old, new in [("epochs: 1", "epochs: 2"), ("train_images: 64", "train_images: 32"), ("0.5", "0.7")]:
        assert read_plan(write(tmp_path, PLAN.replace(old, new))).settings("tuned") != before
    assert read_plan(write(tmp_path, PLAN.replace("seeds: 3", "seeds: 5"))).settings("tuned") == before


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "embed_dim",
            "width",
            "plan.yaml: the plan, network: there is no entry 'width'; expected depth, embed_dim",
        ),
        (", depth: 4", "", "network: .*missing .*'depth'"),
        ("start: dense", "start: dens", "arm tuned: there is no arm 'dens'"),
        ("recipe: scratch, keep", "recipe: sctratch, keep", "arm tuned: there is no recipe 'sctratch'"),
        ("seeds: 3", "seeds: 1", "arm tuned has 2 seeds, and dense, which it needs, has fewer"),
        ("keep_rate: 0.5", "keep_rate: 1.5", r"arm tuned: keep_rate must be in \(0, 1\], got 1.5"),
        ("keep_rate: 0.5", "keep_rate: 0.5, rule: evti", "arm tuned: there is no rule 'evti'"),
        ("keep_rate: 0.5", "keep_rate: 0.5, model: bert", "model must be vit or dynamicvit, got 'bert'"),
        ("dense: {recipe: scratch", "dense: {start: tuned", "start from each other in a circle"),
        ("dense: {recipe: scratch, seeds", "dense: {seeds", "arm dense: nothing is trained"),
        ("epochs: 1", "epochs: 0", "recipes, scratch: epochs must be at least 1, got 0"),
        (
            "questions: {}",
            "questions: {q: {title: t, ask: a, hypothesis: h, arms: [dense], comparisons: "
            "[{arm: tuned, with_arm: dense}], answer: 'so {dense - tuned}'}}",
            "question q: no comparison is 'dense - tuned'; there are tuned - dense",
        ),
        ("questions: {}", "questions: []", "questions: expected names with values, got list"),
    ],
)
def test_wrong_plans(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in PLAN
    with pytest.raises(ValueError, match=message):
        read_plan(write(tmp_path, PLAN.replace(old, new)))
