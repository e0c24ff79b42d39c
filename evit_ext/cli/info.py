"""``evit info``: what models cost, layer by layer, what fits a budget, and how evit_ext was built."""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import timm
import torch

from evit_ext._util.compiled import build_info
from evit_ext._util.files import replacing
from evit_ext._util.tables import aligned
from evit_ext._util.version import VERSION
from evit_ext.cli.output import check_writable, say_next
from evit_ext.cost import budget
from evit_ext.cost.depth import fit_keep_rates
from evit_ext.cost.layers import LayerCost, layer_costs
from evit_ext.cost.macs import count_macs
from evit_ext.models.by_name import create_evit
from evit_ext.patching.families import locate
from evit_ext.patching.keep_rates import keep_rates, set_keep_rate
from evit_ext.tokens.stage import find_stages

KEEP_RATES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)


def run(options: argparse.Namespace) -> None:
    if options.budget is None and options.tolerance is not None:
        raise ValueError("--tolerance is for a --budget, which is not given")
    if options.budget is None and options.schedule is not None:
        raise ValueError("--schedule needs a --budget, which is not given")
    if options.schedule is None and options.drop_loc is not None:
        raise ValueError("--drop-loc is for a --schedule, which is not given")
    if options.schedule is not None and (options.tolerance is not None or options.keep_rates):
        raise ValueError(
            "--schedule finds the keep rates that fit the budget: leave out --tolerance and --keep-rate"
        )
    if options.budget is not None and options.img_size is not None:
        raise ValueError("--budget chooses the sizes of images: leave out --img-size")
    names = options.models or ["deit_small", "dynamicvit_small"]
    if options.output is not None:
        check_writable(options.output)
    look = _fits if options.schedule is None else _schedule
    fits = [] if options.budget is None else [look(name, options) for name in names]
    rates = options.keep_rates or KEEP_RATES
    found: list[dict[str, Any]] = []
    if options.budget is None or options.json or options.output is not None:
        found = [_facts(name, options.keep_rates, rates, options.img_size) for name in names]
    everything = {"build": _build(), "models": found, **({"budget": fits} if fits else {})}
    if options.output is not None:
        with replacing(options.output) as file:
            file.write(json.dumps(everything, indent=2) + "\n")
    if options.json:
        print(json.dumps(everything, indent=2))
        return
    if options.budget is not None:
        text = _fits_text if options.schedule is None else _schedule_text
        print("\n\n".join(text(fit) for fit in fits))
    elif len(options.models) == 1:
        print(_text_of_one(found[0]))
    else:
        print("\n".join(f"{name}: {_text(value)}" for name, value in _build().items()))
        print(f"\n{_side_by_side(found, rates)}")
    say_next(
        ["evit", "benchmark", names[0]],
        ["evit", "train", "--data", "FOLDER", "--model", names[0]],
    )


def _build() -> dict[str, Any]:
    return {
        "evit_ext": VERSION,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "python": platform.python_version(),
        **{name: value for name, value in build_info().items() if name != "version"},
    }


def _text(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value)) or "none"
    return {True: "yes", False: "no"}.get(value, str(value)) if isinstance(value, bool) else str(value)


def _facts(
    name: str, first: Sequence[float] | None, rates: Sequence[float], size: int | None
) -> dict[str, Any]:
    """Return the facts to show about a model: its layers at `first[0]`, its cost at `rates`."""
    arguments: dict[str, Any] = {} if size is None else {"img_size": size}
    with torch.device("meta"):
        model: Any = create_evit(name, **arguments).eval()
    if first:
        set_keep_rate(model, first[0])
    own = keep_rates(model)
    layers = layer_costs(model, size)
    located = locate(model)
    assert located is not None
    blocks: Any = located.blocks
    tokens = next(layer.tokens_in for layer in layers if layer.tokens_in is not None)
    costs = []
    for rate in rates:
        set_keep_rate(model, rate)
        costs.append(layer_costs(model, size))
    set_keep_rate(model, 1.0)
    dense = count_macs(model, size)
    return {
        "model": name,
        "class": type(model).__name__,
        "input_size": list(model.patch_embed.img_size) if size is None else [size, size],
        "patches": tokens - model.num_prefix_tokens,
        "patch_size": model.patch_embed.feat_ratio(),
        "prefix_tokens": model.num_prefix_tokens,
        "blocks": len(blocks),
        "channels": model.embed_dim,
        "heads": getattr(getattr(blocks[0], "attn", None), "num_heads", None),
        "parameters": sum(layer.parameters for layer in layers),
        "keep_rate": own,
        "reduction": find_stages(model)[0].rule.describe(),
        "layers": [layer._asdict() for layer in layers],
        "gmacs": {
            f"{rate:g}": sum(layer.macs for layer in cost) / 1e9
            for rate, cost in zip(rates, costs, strict=True)
        },
        "keep_rates": [
            {
                "keep_rate": rate,
                "gmacs": (macs := sum(layer.macs for layer in cost)) / 1e9,
                "share": macs / dense,
                "speed_up": dense / macs,
                "tokens": [layer.tokens_out for layer in cost if layer.tokens_out is not None][-1],
            }
            for rate, cost in zip(rates, costs, strict=True)
        ],
    }


def _text_of_one(facts: dict[str, Any]) -> str:
    """Return the result of :func:`_facts` as text."""
    height, width = facts["input_size"]
    prefix = facts["prefix_tokens"]
    heads = "" if facts["heads"] is None else f", {facts['heads']} heads"
    return "\n".join(
        [
            f"{facts['model']}: {facts['class']}, {facts['blocks']} blocks, {facts['channels']} channels"
            f"{heads}",
            f"parameters: {facts['parameters'] / 1e6:.2f} M",
            f"images: {height} x {width}, {facts['patches']} patches of {facts['patch_size']} x "
            f"{facts['patch_size']}, and {prefix} prefix {'token' if prefix == 1 else 'tokens'}",
            f"keep rate: {' '.join(f'{rate:g}' for rate in facts['keep_rate'])}"
            + f", what is not kept is {facts['reduction']}",
            "",
            _layer_table([LayerCost(**layer) for layer in facts["layers"]]),
            "",
            _keep_rate_table(facts["keep_rates"]),
        ]
    )


def _layer_table(layers: Sequence[LayerCost]) -> str:
    """Return a table with a line for each part; consecutive blocks with the same tokens share a line."""
    whole = sum(layer.macs for layer in layers)
    lines = [["part", "tokens in", "out", "patches kept", "fused", "parameters", "GMACs", "share"]]
    for _, group in groupby(enumerate(layers), _alike):
        run = [layer for _, layer in group]
        first, macs = run[0], sum(layer.macs for layer in run)
        name = first.name or "(embeddings)"
        lines.append(
            [
                name if len(run) == 1 else f"{name} - {run[-1].name.rpartition('.')[2]}",
                _or_dash(first.tokens_in),
                _or_dash(first.tokens_out),
                "-" if first.kept is None else f"{first.kept} of {first.patches}",
                _or_dash(first.fused),
                f"{sum(layer.parameters for layer in run):,}",
                f"{macs / 1e9:.3f}",
                f"{macs / whole:.1%}",
            ]
        )
    parameters = sum(layer.parameters for layer in layers)
    lines.append(["all", "", "", "", "", f"{parameters:,}", f"{whole / 1e9:.3f}", "100.0%"])
    return aligned(lines)


def _alike(numbered: tuple[int, LayerCost]) -> Any:
    """Return a key that is equal exactly for blocks that share a line of the table."""
    number, layer = numbered
    if layer.tokens_in is None or layer.patches is not None:
        return number
    return layer._replace(name="")


def _or_dash(value: int | None) -> str:
    return "-" if value is None else str(value)


def _keep_rate_table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [["keep rate", "GMACs", "of keep rate 1", "speed-up in theory", "tokens at the end"]]
    for row in rows:
        lines.append(
            [
                f"{row['keep_rate']:g}",
                f"{row['gmacs']:.2f}",
                f"{row['share']:.0%}",
                f"{row['speed_up']:.2f}",
                str(row["tokens"]),
            ]
        )
    return aligned(lines)


def _side_by_side(found: Sequence[dict[str, Any]], rates: Sequence[float]) -> str:
    lines = [["model", "parameters", *(f"{rate:g}" for rate in rates)]]
    for facts in found:
        gmacs = (f"{value:.2f}" for value in facts["gmacs"].values())
        lines.append([facts["model"], f"{facts['parameters'] / 1e6:.2f} M", *gmacs])
    return f"Multiply-accumulates of one image in 10^9, by keep rate:\n\n{aligned(lines)}"


def _budget(options: argparse.Namespace) -> float:
    """Return the budget in multiply-accumulates."""
    try:
        macs = float(options.budget) * 1e9
    except ValueError:
        macs = float(budget.cost_of(options.budget))
    if not 0 < macs <= budget.MOST_MACS:
        raise ValueError(
            f"--budget must be GMACs, 10^9 multiply-accumulates, above 0 and at most "
            f"{budget.MOST_MACS / 1e9:g}, or a model's name, got {options.budget}"
        )
    return macs


def _schedule(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return keep rates over the depth of a model that fit the budget."""
    fit = fit_keep_rates(name, _budget(options), shape=options.schedule, drop_loc=options.drop_loc)
    return {
        "model": name,
        "schedule": options.schedule,
        "gmacs": fit.macs / 1e9,
        "drop_loc": fit.drop_loc,
        "keep_rate": fit.keep_rates,
        "tokens": fit.tokens,
    }


def _schedule_text(found: dict[str, Any]) -> str:
    lines = [["block", "keep rate"]]
    lines += [
        [str(block), f"{rate:g}"] for block, rate in zip(found["drop_loc"], found["keep_rate"], strict=True)
    ]
    return (
        f"{found['model']}, {found['schedule']} over the depth: {found['gmacs']:.4g} GMACs, "
        f"{found['tokens']} patch tokens at the end\n\n{aligned(lines)}\n\n"
        f"evit_ext.apply(vit, {list(found['keep_rate'])}, drop_loc={list(found['drop_loc'])})"
    )


def _fits(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return which configurations of a model fit the budget."""
    tolerance = budget.TOLERANCE if options.tolerance is None else options.tolerance / 100
    if not 0 <= tolerance <= 1:
        raise ValueError(f"--tolerance must be from 0 to 100 percent, got {options.tolerance:g}")
    macs = _budget(options)
    fits = budget.fit_budget(name, macs, options.keep_rates or budget.KEEP_RATES, tolerance)
    return {
        "model": name,
        "gmacs": macs / 1e9,
        "tolerance": tolerance,
        "fits": [
            {"img_size": fit.img_size, "keep_rate": fit.keep_rate, "gmacs": fit.macs / 1e9} for fit in fits
        ],
    }


def _fits_text(found: dict[str, Any]) -> str:
    lines = [["img_size", "keep rate", "GMACs", "of the budget"]]
    for fit in found["fits"]:
        share = fit["gmacs"] / found["gmacs"]
        lines.append([f"{fit['img_size']}", f"{fit['keep_rate']:g}", f"{fit['gmacs']:.2f}", f"{share:.1%}"])
    return (
        f"{found['model']} for {found['gmacs']:.4g} GMACs, {100 * found['tolerance']:g} % more allowed; for "
        f"each size of images the highest keep rate that fits:\n\n{aligned(lines)}"
    )
