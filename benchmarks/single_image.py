"""Where the time of a single image goes on the CPU, and what this machine can do at most.

    python benchmarks/single_image.py --output benchmarks/results/single-image-cpu

DeiT-S at 224 pixels and keep rate 0.7, prepacked, batch 1. Before each call, as much other data is read as
--between says, as in a program that does other things, too: weights and code are then in no cache. "The
call" is the model's; the lines below it are of the same operators in a row, each timed, without a model
around them, in turns with it; "inside oneDNN's products" is by its own profile, in a process of its own.
What is left of the call is what finds out whether the modules are still what they were, and Python.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from operator_times.facts import machine
from torch import Tensor

import evit_ext
from evit_ext import models
from evit_ext._util.tables import aligned
from evit_ext.cpu import forward as cpu_forward
from evit_ext.cpu.packed_weights import _reorder

KEEP_RATE, WARM_UP = 0.7, 10
_linear = torch.ops.mkldnn._linear_pointwise


class Parts:
    """A model's operators in a row, with the seconds that each kind of them took."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.seconds: dict[str, float] = defaultdict(float)
        self.shapes: dict[tuple[int, int, int], int] = defaultdict(int)
        self._packed = {
            layer: (_reorder(layer.weight.detach()), layer.bias)
            for layer in model.blocks.modules()
            if isinstance(layer, torch.nn.Linear)
        }

    def _timed(self, kind: str, call: Callable[..., Any], *arguments: Any) -> Any:
        start = time.perf_counter()
        out = call(*arguments)
        self.seconds[kind] += time.perf_counter() - start
        return out

    def _product(self, layer: Any, x: Tensor, to: Tensor | None = None, gelu: bool = False) -> Tensor:
        self.shapes[x.shape[1], layer.in_features, layer.out_features] += 1
        weight, bias = self._packed[layer]
        if to is not None:
            return self._timed("48 linear layers", _linear.binary, x, to, weight, bias, "add")
        last = ("gelu", [], "none") if gelu else ("none", [], "")
        return self._timed("48 linear layers", _linear, x, weight, bias, *last)

    def _norm(self, norm: Any, x: Tensor) -> Tensor:
        arguments = x, norm.normalized_shape, norm.weight, norm.bias, norm.eps
        return self._timed("norms, reductions and head", F.layer_norm, *arguments)

    def __call__(self, images: Tensor) -> Tensor:
        model = self.model
        x = self._timed("patches and positions", lambda: model._pos_embed(model.patch_embed(images)))
        for block in model.blocks:
            attention, mlp = block.attn, block.mlp
            qkv = self._product(attention.qkv, self._norm(block.norm1, x))
            out, scores = self._timed(
                "attention", evit_ext.ops.attention_with_scores, qkv, attention.num_heads
            )
            if hasattr(block, "rule"):
                branch, norm = self._product(attention.proj, out), block.norm2
                keep = block.rule.num_kept(x.shape[1] - 1, None)
                arguments = x, branch, scores, keep, norm.weight, norm.bias, norm.eps
                reduce = evit_ext.ops.add_reorganize_norm
                x, normed, _ = self._timed("norms, reductions and head", reduce, *arguments)
            else:
                x = self._product(attention.proj, out, to=x)
                normed = self._norm(block.norm2, x)
            x = self._product(mlp.fc2, self._product(mlp.fc1, normed, gelu=True), to=x)
        return self._timed("norms, reductions and head", lambda: model.forward_head(model.norm(x)))


@torch.inference_mode(False)  # for weights that can be packed
def build(precision: str) -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    dtype = getattr(torch, precision)
    model = evit_ext.prepack(models.deit_small(keep_rate=KEEP_RATE).eval().to(dtype))
    return model, torch.randn(1, 3, 224, 224).to(dtype)


def measure(precision: str, calls: int, between: Tensor) -> dict[str, float]:
    """Return milliseconds by line."""
    model, images = build(precision)
    parts = Parts(model)
    torch.testing.assert_close(parts(images), model(images), rtol=0.1, atol=0.1)
    taken = []
    for call in range(WARM_UP + calls):
        if call == WARM_UP:
            parts.seconds.clear()
        between.sum()
        start = time.perf_counter()
        model(images)
        taken.append(time.perf_counter() - start)
        between.sum()
        parts(images)
    rows = {"the call": statistics.fmean(taken[WARM_UP:])}
    rows |= {kind: seconds / calls for kind, seconds in sorted(parts.seconds.items())}
    rows["the rest of the call"] = rows["the call"] - sum(parts.seconds.values()) / calls
    return {kind: 1e3 * seconds for kind, seconds in rows.items()}


def inside_products(precision: str, calls: int, mib: int) -> float:
    """Return the milliseconds a call that oneDNN's profile says its 48 products took."""
    command = [
        sys.executable,
        __file__,
        "--only-call",
        precision,
        "--calls",
        str(calls),
        "--between",
        str(mib),
    ]
    environment = {**os.environ, "ONEDNN_VERBOSE": "profile_exec"}
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    begin = said.splitlines().index("begin")
    products = [line for line in said.splitlines()[begin:] if ",inner_product," in line]
    # The first of each call is that of the patches.
    blocks = [float(line.rpartition(",")[2]) for line in products if "ic768oc384" not in line]
    if len(blocks) != 48 * calls:
        raise RuntimeError(f"expected oneDNN to report {48 * calls} products, got {len(blocks)}")
    return sum(blocks) / calls


def only_call(precision: str, calls: int, between: Tensor) -> None:
    """Run the model for :func:`inside_products`."""
    model, images = build(precision)
    for call in range(WARM_UP + calls):
        if call == WARM_UP:
            print("begin", flush=True)
        between.sum()
        model(images)


def limits(precision: str, between: Tensor) -> dict[str, str]:
    """Return what this machine does with weights in its caches, and what a layer costs that does nothing."""
    model, images = build(precision)
    parts = Parts(model)
    parts(images)
    macs = seconds = 0.0
    dtype = images.dtype
    for (rows, channels, out), count in parts.shapes.items():
        product = _layer(rows, channels, out, dtype)
        seconds += count * _median(product, 50)
        macs += count * rows * channels * out
    empty = _layer(1, 64, 64, dtype)
    read = between.numel() * between.element_size() / _median(between.sum, 20)
    return {
        "products, GMAC/s": f"{macs / seconds / 1e9:.0f}",
        "their GMACs": f"{macs / 1e9:.2f}",
        "reading memory, GB/s": f"{read / 1e9:.0f}",
        "a layer of 64 × 64, µs": f"{1e6 * _median(empty, 300):.0f}",
        "the same after other data": f"{1e6 * _median(empty, 100, between):.0f}",
    }


def _layer(rows: int, channels: int, out: int, dtype: torch.dtype) -> Callable[[], Tensor]:
    x, bias = torch.randn(1, rows, channels).to(dtype), torch.randn(out).to(dtype)
    weight = _reorder(torch.randn(out, channels).to(dtype))
    return lambda: _linear(x, weight, bias, "none", [], "")


def _median(call: Callable[[], Any], calls: int, between: Tensor | None = None) -> float:
    taken = []
    for _ in range(5 + calls):
        if between is not None:
            between.sum()
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[5:])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = [name for name in ("bfloat16", "float32") if getattr(torch, name) in cpu_forward._LINEAR_DTYPES]
    parser.add_argument(
        "--precision", nargs="+", choices=known, default=known, help=f"(default: {' '.join(known)})"
    )
    parser.add_argument("--calls", type=int, default=100, metavar="N", help="(default: 100)")
    parser.add_argument("--between", type=int, default=256, metavar="MIB", help="(default: 256)")
    parser.add_argument("--output", type=Path, metavar="STEM", help="write STEM.json and STEM.md, too")
    parser.add_argument("--only-call", choices=known, help=argparse.SUPPRESS)
    options = parser.parse_args()
    facts = {**machine("cpu"), "threads": torch.get_num_threads(), "MiB read before a call": options.between}
    between = torch.ones(options.between * 2**18)
    with torch.inference_mode():
        if options.only_call:
            only_call(options.only_call, options.calls, between)
            return
        found: dict[str, dict[str, Any]] = {}
        for precision in options.precision:
            rows: dict[str, Any] = measure(precision, options.calls, between)
            rows["inside oneDNN's products"] = inside_products(precision, options.calls, options.between)
            rows = {f"{kind}, ms": round(value, 2) for kind, value in rows.items()}
            found[precision] = {**rows, **limits(precision, between)}
    lines = [
        ["", *found],
        *([name, *(str(found[p][name]) for p in found)] for name in next(iter(found.values()))),
    ]
    table = aligned(lines)
    print(table)
    if options.output is not None:
        said = "".join(f"- {name}: {fact}\n" for name, fact in facts.items())
        text = f"# A single image on the CPU\n\n{said}\n```\n{table}\n```\n"
        options.output.with_suffix(".json").write_text(
            json.dumps({"machine": facts, "found": found}, indent=1) + "\n"
        )
        options.output.with_suffix(".md").write_text(text)


if __name__ == "__main__":
    main()
