"""The README's figures of cluttered digits are those of the study's results."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from pathlib import Path

from study.__main__ import HERE
from study.plan import read_plan
from study.results import Results
from study.speed import network_of, read_speed
from study.statistics import difference

ROWS = {
    "DeiT": "dense",
    "EViT 0.7, fine-tuned": "tuned-0.7",
    "EViT 0.5, fine-tuned": "tuned-0.5",
    "EViT 0.7, not trained again": "untrained-0.7",
    "EViT 0.5, not trained again": "untrained-0.5",
}


def rows() -> Iterator[str]:
    plan = read_plan(HERE / "plan.yaml")
    results = Results(HERE / "results/plan", plan)
    speed = read_speed(plan, results.speed)["images_per_second"]
    for title, name in ROWS.items():
        found = list(results.of(name).values())
        top1 = [result["top1"] for result in found]
        kept = at_random = "–"
        if "object_patches_kept" in found[0]:
            kept, at_random = (
                ", ".join(f"{statistics.median(stage):.0%}" for stage in zip(*shares, strict=True))
                for shares in (
                    [result[entry] for result in found]
                    for entry in ("object_patches_kept", "object_patches_kept_at_random")
                )
            )
        spread = f"{statistics.median(top1):.1f} ({min(top1):.1f} to {max(top1):.1f})"
        dense, own = (
            {seed: result["top1"] for seed, result in results.of(one).items()} for one in ("dense", name)
        )
        change = difference(own, dense)
        against = "–" if name == "dense" else f"{change.mean:+.2f} [{change.low:+.2f}, {change.high:+.2f}]"
        images = f"{speed[network_of(plan.arms[name])]:,.0f}"
        cells = [title, str(len(found)), spread, against, f"{found[0]['gmacs']:.4f}", images, kept, at_random]
        yield "| " + " | ".join(cell.replace("%", " %") for cell in cells) + " |"


def test_table() -> None:
    text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    missing = [row for row in rows() if row not in text]
    assert not missing, "README.md should say:\n" + "\n".join(rows())
