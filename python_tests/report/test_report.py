"""The report of a run: figures, curves, pictures and what was unreadable, in one file without a script."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import runs
import torch
from browser import Browser, find_browser
from image_data import damage, write_folder
from PIL import Image

from evit_ext.cli import main
from evit_ext.report.curves import _ticks, chart
from evit_ext.report.pictures import _left
from evit_ext.report.records import read_run
from evit_ext.visualize.views import StageView

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    data = write_folder(folder / "data", train=10, val=5)
    damage(data / "train" / "flower")
    (data / "train" / "<b>bold").mkdir()
    (data / "train" / "china" / "0.jpg").rename(data / "train" / "<b>bold" / "0.jpg")
    (data / "train" / "<b>bold" / "1.jpg").write_bytes(b"<script>")
    runs.train(folder / "run", [*runs.SMALL, "--data", str(data), "--eval-every", "1"])
    return folder / "run"


def test_records(run: Path) -> None:
    records = read_run(str(run))
    losses = records.curve("train", "loss")
    assert len(losses) == 2 * 1 and losses[-1][0] == 2.0 and records.horizontal == "epoch"
    assert [x for x, _ in records.curve("val", "top1")] == [1.0, 2.0]
    assert records.summary is not None and records.summary["epochs"] == 2
    assert len(records.unreadable) == 5
    assert records.curve("train", "nothing") == []


def test_a_page(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "new" / "page.html"
    assert main(["report", str(run), "-o", str(output), "--images", "4", "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert f"{output}: " in said and "4 images" in said and "next:\n  evit eval" in said
    page = output.read_text("utf-8")
    for title in ("Loss", "Top-1 accuracy", "Keep rate", "Learning rate", "Throughput"):
        assert f"<h3>{title}</h3>" in page
    assert "moving average" in page and page.count("<polyline") >= 8
    assert page.count('class="photo"') == 4 and "Unreadable images: 5" in page
    assert "&lt;b&gt;bold/1.jpg" in page and "not an image that Pillow knows" in page
    # Nothing is fetched, nothing runs, and no name becomes markup.
    assert "<script" not in page and "<b>bold" not in page and not re.search(r'(src|href)="(?!data:)', page)
    assert "default-src 'none'" in page and "keep_rate_end_epoch" in page
    for stage in re.findall(r'<figure class="photo">.*?</figure>', page):
        assert stage.count("<img") == 4  # as seen and after each of three stages


def test_without_the_data_or_the_end(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a run that goes on, and whose images are gone, there are curves."""
    import shutil

    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace("/data", "/gone"))
    assert main(["report", str(tmp_path / "run")]) == 0
    page = (tmp_path / "run" / "report.html").read_text("utf-8")
    assert "The run has not ended: the figures go to step 2." in page
    assert "No pictures: data must be a folder" in page and "<polyline" in page
    assert "without pictures: data must be a folder" in capsys.readouterr().out
    rows = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    (tmp_path / "run" / "metrics.csv").write_text("\n".join(rows[:2]) + "\n")
    assert main(["report", str(tmp_path / "run"), "--images", "0"]) == 0
    for name in ("metrics.csv", "config.yaml"):
        (tmp_path / "run" / name).unlink()
        assert main(["report", str(tmp_path / "run")]) == 2
        assert "is not the folder of a run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("low", "high"), [(0.0, 1.0), (0.7, 0.7), (0.0, 0.0), (-3.0, 5e9), (1e-9, 2e-9), (99.5, 100.0)]
)
def test_ticks(low: float, high: float) -> None:
    ticks = _ticks(low, high)
    assert 2 <= len(ticks) <= 7 and ticks[0] <= low <= high <= ticks[-1] and ticks == sorted(set(ticks))


def test_a_chart_of_many_points() -> None:
    drawn = chart("Loss", {"a": [(x / 10, 1.0) for x in range(10_000)], "none": []}, "epoch")
    (points,) = re.findall(r'points="([^"]*)"', drawn)
    assert 200 <= len(points.split()) <= 300 and "none" not in drawn
    assert chart("Loss", {"none": []}, "epoch") == ""


@pytest.mark.skipif(find_browser() is None, reason="there is no Chromium in the PATH")
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [420, 1280])
def test_in_a_browser(run: Path, tmp_path: Path, width: int, dark: bool) -> None:
    """Nothing is wider than the window, all pictures load, and text can be told from what is behind it."""
    page = tmp_path / "page.html"
    assert main(["report", str(run), "-o", str(page), "--device", "cpu"]) == 0
    with Browser(page, width=width, dark=dark) as browser:
        assert browser.js("document.documentElement.scrollWidth") <= width
        assert browser.js("[...document.images].every(image => image.naturalWidth > 0)")
        ink, paper = (
            sum(map(int, re.findall(r"\d+", browser.js(f"getComputedStyle(document.body).{name}"))))
            for name in ("color", "backgroundColor")
        )
        assert (ink - paper > 400) if dark else (paper - ink > 400)
        assert browser.problems == []


def test_merged_patches_have_the_mean_colour_of_their_group() -> None:
    image = Image.effect_noise((32, 32), 90).convert("RGB")
    groups, every = torch.tensor([[0, 0], [1, 2]]), torch.ones(2, 2, dtype=torch.bool)
    stage = StageView(every, torch.full((2, 2), float("nan")), 1, False, groups)
    shown = np.asarray(_left(image, stage))
    assert (shown[:16] == shown[0, 0]).all()
    assert np.array_equal(shown[16:], np.asarray(image)[16:])
    kept = StageView(torch.tensor([[False, True], [True, True]]), stage.scores, 1, True)
    assert np.array_equal(np.asarray(_left(image, kept))[16:], np.asarray(image)[16:])
