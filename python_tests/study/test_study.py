"""The whole of a study, with the plan that takes seconds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from evit_ext.training import shared_memory
from study.__main__ import HERE, main
from study.experiment import Experiment
from study.plan import read_plan
from study.results import Results
from study.speed import network_of, read_speed

SMOKE = HERE / "smoke.yaml"
ARMS = ("dense", "evit")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything of seed 0, and `dense` of seed 1."""
    folder = tmp_path_factory.mktemp("study")
    assert run(folder, "--seeds", "0") == 0
    assert run(folder, "--seeds", "1", "--arms", "dense") == 0
    return folder


def run(folder: Path, *more: str) -> int:
    where = ["--plan", str(SMOKE), "--results", str(folder / "results")]
    return main([*where, "run", "--weights", str(folder / "weights"), *more])


def test_every_run_has_a_result(folder: Path) -> None:
    plan = read_plan(SMOKE)
    results = Results(folder / "results", plan)
    for name, arm in plan.arms.items():
        result = results.of(name)[0]
        assert result["test_images"] == 40 and 0 <= result["top1"] <= 100
        assert (len(result["losses"]) > 0) == (arm.recipe is not None)
        assert ("object_patches_kept" in result) == (arm.reduces and name != "tome")
    dense, evit = results.of("dense")[0], results.of("evit")[0]
    assert evit["gmacs"] < dense["gmacs"] and evit["parameters"] == dense["parameters"]
    assert results.of("larger")[0]["gmacs"] > evit["gmacs"]
    assert results.of("dynamicvit")[0]["gmacs"] < dense["gmacs"]


def test_nothing_is_run_twice(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(folder, "--seeds", "0") == 0
    assert capsys.readouterr().out == ""


def test_weights_that_are_gone_are_made_again(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bit for bit, and the result stays: a study may go on where only the results are."""
    weights, result = folder / "weights/dense.1.safetensors", folder / "results/dense.1.json"
    before, said = weights.read_bytes(), result.read_bytes()
    weights.unlink()
    assert run(folder, "--seeds", "1", "--arms", "dense") == 0
    assert "dense, seed 1" in capsys.readouterr().out
    assert weights.read_bytes() == before and result.read_bytes() == said


def test_weights_of_other_settings_are_not_started_from(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two plans may have arms of one name."""
    plan = tmp_path / "other.yaml"
    plan.write_text(SMOKE.read_text().replace("lr: 1.0e-2", "lr: 2.0e-2"))
    weights = tmp_path / "weights"
    shutil.copytree(folder / "weights", weights)
    before = (weights / "dense.0.safetensors").read_bytes()
    experiment = Experiment(read_plan(plan), "untrained", 0, weights)
    with pytest.raises(
        FileNotFoundError, match="or is of a run with other settings than the plan's: run dense"
    ):
        experiment.build()
    where = ["--plan", str(plan), "--results", str(tmp_path / "results")]
    assert main([*where, "run", "--weights", str(weights), "--seeds", "0", "--arms", "untrained"]) == 0
    assert "dense, seed 0" in capsys.readouterr().out
    assert (weights / "dense.0.safetensors").read_bytes() != before


def test_results_of_other_settings_are_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = tmp_path / "smoke.yaml"
    plan.write_text(
        SMOKE.read_text().replace("keep_rate: 0.5, canvas_size: 40", "keep_rate: 0.7, canvas_size: 40")
    )
    assert main(["--plan", str(plan), "--results", str(folder / "results"), "list"]) == 1
    said = capsys.readouterr().err
    assert (
        "larger.0.json is of a run with other settings" in said
        and "arm.keep_rate: 0.5, in the plan 0.7" in said
    )


def test_a_damaged_result(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "dense.0.json").write_text("{")
    assert main(["--plan", str(SMOKE), "--results", str(tmp_path), "list"]) == 1
    assert "dense.0.json is damaged" in capsys.readouterr().err


def test_page(folder: Path, tmp_path: Path) -> None:
    where = ["--plan", str(SMOKE), "--results", str(folder / "results")]
    assert main([*where, "page", "--output", str(tmp_path / "study.md")]) == 0
    text = (tmp_path / "study.md").read_text()
    assert "**11 of 18 runs**" in text and "| dense | 2 |" in text
    assert "**evit** against **dense**, top-1: not shown: fewer than two runs" in text
    answer = "**Answer:** EViT against the dense network: not shown: fewer than two runs ("
    assert answer in text and "\n**The paper:** Nothing of it.\n" in text
    assert (tmp_path / "study/smoke.svg").read_text().startswith("<?xml")
    # A page of another name has its plots beside those.
    assert main([*where, "page", "--output", str(tmp_path / "other.md")]) == 0
    assert "(other/smoke.svg)" in (tmp_path / "other.md").read_text()
    assert (tmp_path / "other/smoke.svg").read_bytes() == (tmp_path / "study/smoke.svg").read_bytes()


def test_where_pages_are(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of plan.yaml is not written over by another."""
    monkeypatch.chdir(tmp_path)
    assert main(["--plan", str(SMOKE), "--results", str(folder / "results"), "page"]) == 0
    assert [path.name for path in (tmp_path / "docs").glob("*.md")] == ["study-smoke.md"]
    text = (tmp_path / "docs/study-smoke.md").read_text()
    assert "python -m study --plan study/smoke.yaml run --minutes 60" in text and "make study" not in text


def test_too_many_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shared_memory, "shared_memory_free", lambda: 2**20)
    where = ["--plan", str(SMOKE), "--results", str(tmp_path / "results"), "run", "--weights"]
    options = ["--arms", "dense", "--seeds", "0", "--workers", "4"]
    assert main([*where, str(tmp_path / "weights"), *options]) == 1
    assert "use fewer --workers, or make it larger" in capsys.readouterr().err


def test_speed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Once for arms whose networks differ in weights only, and trained by none."""
    plan = tmp_path / "two.yaml"
    arms = "  dense: {recipe: scratch}\n  evit: {recipe: warm-up, keep_rate: 0.5}\n"
    arms += "  untrained: {start: dense, keep_rate: 0.5}\n"
    questions = "  smoke: {title: a, ask: b, hypothesis: c, arms: [dense, untrained]}\n"
    text = SMOKE.read_text()
    plan.write_text(text[: text.index("arms:")] + f"arms:\n{arms}questions:\n{questions}")
    assert main(["--plan", str(plan), "speed", "--seconds", "0.2"]) == 0
    speed = read_speed(read_plan(plan), tmp_path / "results/two/speed.json")
    dense, evit = (speed["images_per_second"][network_of(read_plan(plan).arms[name])] for name in ARMS)
    assert len(speed["images_per_second"]) == 2 and dense > 0 and evit > 0
    assert main(["--plan", str(plan), "page", "--output", str(tmp_path / "study.md")]) == 0
    page = (tmp_path / "study.md").read_text()
    assert f"| untrained | 0 | not run | | | {evit:,.0f} | |" in page
    assert f"{speed['threads']} threads, batches of 250" in page
    plan.write_text(plan.read_text().replace("depth: 4", "depth: 5"))
    assert main(["--plan", str(plan), "page", "--output", str(tmp_path / "study.md")]) == 1
    assert "speed.json was measured of other networks than the plan's" in capsys.readouterr().err


def test_in_processes(folder: Path) -> None:
    assert run(folder, "--jobs", "2", "--arms", "evit", "--workers", "1") == 0
    result = json.loads((folder / "results/evit.1.json").read_text())
    assert result["seed"] == 1


def test_an_unknown_arm(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(folder, "--arms", "evti") == 1
    assert "there is no arm 'evti' in the plan: dense, evit" in capsys.readouterr().err
