"""``evit info``: what models cost, and what was built."""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Sequence
from typing import Any

import timm
import torch

import evit_ext
from evit_ext import _C
from evit_ext.cli.shared import aligned
from evit_ext.models.by_name import create_evit
from evit_ext.training.keep_rates import set_keep_rate

KEEP_RATES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)


def add_parser(commands: Any) -> None:
    """Add ``evit info`` to the commands."""
    parser = commands.add_parser(
        "info",
        help="parameters and multiply-accumulates of models, and what was built",
        description="Print what models cost at several keep rates, side by side, and what was built. Nothing "
        "is computed, downloaded or kept in memory: the models are built on the meta device.",
        epilog="Example: evit info deit_base dynamicvit_base --keep-rate 0.7 0.5",
    )
    parser.add_argument(
        "models",
        nargs="*",
        metavar="MODEL",
        default=["deit_small", "dynamicvit_small"],
        help="a model of evit_ext.models, or any of timm's that evit_ext.apply supports (default: "
        "deit_small dynamicvit_small)",
    )
    parser.add_argument(
        "--keep-rate",
        nargs="+",
        type=float,
        default=KEEP_RATES,
        metavar="RATE",
        help="each in (0, 1] (default: 1 0.9 0.8 0.7 0.6 0.5)",
    )
    parser.add_argument(
        "--img-size",
        type=int,
        default=argparse.SUPPRESS,
        metavar="N",
        help="of square images (default: the model's own)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.set_defaults(run=_info)


def _info(options: argparse.Namespace) -> None:
    build = {
        "evit_ext": evit_ext.__version__,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "python": platform.python_version(),
        **{name: value for name, value in _C.build_info().items() if name != "version"},
    }
    size = {"img_size": options.img_size} if "img_size" in options else {}
    costs = [_costs(name, options.keep_rate, size) for name in options.models]
    if options.json:
        print(json.dumps({"build": build, "models": costs}, indent=2))
        return
    print("\n".join(f"{name}: {_text(value)}" for name, value in build.items()))
    lines = [["model", "parameters", *(f"{rate:g}" for rate in options.keep_rate)]]
    for cost in costs:
        gmacs = (f"{value:.2f}" for value in cost["gmacs"].values())
        lines.append([cost["model"], f"{cost['parameters'] / 1e6:.2f} M", *gmacs])
    print(f"\nMultiply-accumulates of one image in 10^9, by keep rate:\n\n{aligned(lines)}")


def _text(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value)) or "none"
    return {True: "yes", False: "no"}.get(value, str(value)) if isinstance(value, bool) else str(value)


def _costs(name: str, keep_rates: Sequence[float], size: dict[str, Any]) -> dict[str, Any]:
    """Return the parameters and, by keep rate, the GMACs of a model."""
    with torch.device("meta"):
        model = create_evit(name, **size).eval()
    gmacs = {}
    for rate in keep_rates:
        set_keep_rate(model, rate)
        gmacs[f"{rate:g}"] = evit_ext.count_macs(model, size.get("img_size")) / 1e9
    return {
        "model": name,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "gmacs": gmacs,
    }
