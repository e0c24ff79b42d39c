"""How many images a second the networks of a study take: measured once, as it depends on no seed."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from evit_ext._util.files import replacing
from evit_ext.benchmark import Contestant, measure
from evit_ext.training import choose_precision
from study.experiment import Experiment, processor_name
from study.plan import Arm, Plan

#: Images at a time: those of a test.
_BATCH = 250


def measure_speed(
    plan: Plan, path: Path, seconds: float, device: str = "cpu", precision: str = "float32"
) -> None:
    """Measure the networks of all arms, in turns, and write images a second into a JSON file.

    Arms whose networks differ in weights only are measured once. On the CPU each runs in its own process.
    """
    chosen = choose_precision(torch.device(device), precision)
    networks: dict[str, str] = {}
    for name, arm in plan.arms.items():
        networks.setdefault(network_of(arm), name)
    by_size: dict[int, list[Contestant]] = {}
    for name in networks.values():
        experiment = Experiment(plan, name, 0, path.parent, device)
        model = experiment.build(trained=False).to(device).eval()
        size = plan.arms[name].canvas_size or plan.task.canvas_size
        by_size.setdefault(size, []).append(Contestant(name, model, None, None))
    found: dict[str, float] = {}
    for size, models in by_size.items():
        images = torch.randn(_BATCH, 3, size, size, device=device)
        share = seconds * len(models) / len(networks)
        rows = measure(models, images, precision=chosen, seconds=share)
        found |= {network_of(plan.arms[row.model]): round(row.images_per_second, 1) for row in rows}
    written: dict[str, Any] = {
        "processor": processor_name(torch.device(device)),
        "threads": torch.get_num_threads() if device == "cpu" else None,
        "precision": precision,
        "settings": _settings(plan),
        "batch": _BATCH,
        "networks": [
            {"network": json.loads(network), "images_per_second": images}
            for network, images in sorted(found.items())
        ],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(json.dumps(written, indent=1, sort_keys=True) + "\n")


def network_of(arm: Arm) -> str:
    """Return what an arm's network depends on besides its weights."""
    entries = ("model", "keep_rate", "rule", "rule_args", "drop_loc", "canvas_size")
    return json.dumps({entry: asdict(arm)[entry] for entry in entries}, sort_keys=True)


def _settings(plan: Plan) -> dict[str, Any]:
    """Return what the networks of all arms depend on, values for JSON."""
    return {
        "network": asdict(plan.network),
        "canvas_size": plan.task.canvas_size,
        "patch_size": plan.task.patch_size,
    }


def read_speed(plan: Plan, path: Path) -> dict[str, Any]:
    """Return what :func:`measure_speed` wrote; an empty dictionary if it was not run.

    Its ``images_per_second`` are by :func:`network_of`.

    Raises:
        ValueError: it was measured of other networks than the plan's.
    """
    if not path.exists():
        return {}
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if found.get("settings") != _settings(plan):
        raise ValueError(
            f"{path} was measured of other networks than the plan's: {found.get('settings')}, in the plan "
            f"{_settings(plan)}; run python -m study speed again"
        )
    found["images_per_second"] = {
        json.dumps(entry["network"], sort_keys=True): entry["images_per_second"]
        for entry in found.pop("networks")
    }
    return found
