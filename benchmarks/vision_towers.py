"""Time the vision tower of a LLaVA on an image, and the prefill of a language model by its image tokens.

    python benchmarks/vision_towers.py --output benchmarks/results/vision-towers-cpu

A CLIP ViT-L/14 at 336 pixels (576 patches; features of layer -2) and its projector, and a small language
model with a text of 32 tokens beside the image. Random weights, float32, batch 1; no accuracy can be measured
on them. Everything is called in turns, round after round, and the median counts. The towers share weights.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from operator_times.facts import machine

import evit_ext
from evit_ext import towers
from evit_ext._util.timing import Here, time_in_turns

TOWER: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
TEXT: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "vocab_size": 1000,
}
TEXT_TOKENS = 32
IMAGE_TOKENS = (576, 192, 64)

#: By name, what `towers.apply` is given.
SETUPS: dict[str, dict[str, Any]] = {
    "unchanged": {},
    "select, 192 tokens": {"keep_rate": 1 / 3},
    "inside, keep rate 0.7": {"keep_rate": 0.7, "mode": "inside"},
    "inside, keep rate 0.5": {"keep_rate": 0.5, "mode": "inside"},
}


def build(tower: dict[str, Any], text: dict[str, Any]) -> Any:
    """Return a LLaVA with random weights."""
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**tower), text_config=transformers.LlamaConfig(**text)
    )
    torch.manual_seed(0)
    return transformers.LlavaForConditionalGeneration(config).eval()


def measure(tower: dict[str, Any], text: dict[str, Any], rounds: int) -> dict[str, list[dict[str, Any]]]:
    """Return rows for the tower and for the prefill."""
    llava = build(tower, text)
    shared = {id(parameter): parameter for parameter in llava.parameters()}
    side = tower["image_size"]
    image = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(1))
    models = {}
    for name, arguments in SETUPS.items():
        models[name] = copy.deepcopy(llava, dict(shared))
        if arguments:
            towers.apply(models[name], **arguments)

    def encode(name: str) -> Any:
        return models[name].get_image_features(image).pooler_output[0]

    def prefill(tokens: int) -> Any:
        return llava.model.language_model(inputs_embeds=sequences[tokens], use_cache=True)

    width = text["hidden_size"]
    patches = (side // tower["patch_size"]) ** 2
    counts = [count for count in IMAGE_TOKENS if count <= patches]
    sequences = {count: torch.randn(1, count + TEXT_TOKENS, width) for count in counts}
    calls = {name: Here(lambda name=name: encode(name)) for name in SETUPS}
    prefills = {str(count): Here(lambda count=count: prefill(count)) for count in counts}
    with torch.inference_mode():
        times = time_in_turns(calls, seconds=0, least=rounds, warm_up=1)
        prefill_times = time_in_turns(prefills, seconds=0, least=rounds, warm_up=1)
    gmacs = {name: evit_ext.count_macs(model.model.vision_tower, side) for name, model in models.items()}
    return {
        "tower": [
            {
                "setup": name,
                "tokens": towers.num_image_tokens(models[name]),
                "gmacs": gmacs[name] / 1e9,
                "seconds": statistics.median(times[name]),
                "fastest_seconds": min(times[name]),
            }
            for name in SETUPS
        ],
        "prefill": [
            {
                "image_tokens": int(count),
                "seconds": statistics.median(prefill_times[count]),
                "fastest_seconds": min(prefill_times[count]),
            }
            for count in prefills
        ],
    }


def table(rows: dict[str, list[dict[str, Any]]]) -> str:
    """Return both as tables."""
    first = rows["tower"][0]["seconds"]
    lines = ["| tower | tokens handed on | GMACs | ms (fastest) | times as fast |", "|" + "---|" * 5]
    for row in rows["tower"]:
        lines.append(
            f"| {row['setup']} | {row['tokens']} | {row['gmacs']:.1f} | {1e3 * row['seconds']:.0f} "
            f"({1e3 * row['fastest_seconds']:.0f}) | {first / row['seconds']:.2f} |"
        )
    first = rows["prefill"][0]["seconds"]
    lines += ["", "| prefill: image tokens | ms (fastest) | times as fast |", "|" + "---|" * 3]
    for row in rows["prefill"]:
        lines.append(
            f"| {row['image_tokens']} | {1e3 * row['seconds']:.0f} ({1e3 * row['fastest_seconds']:.0f}) "
            f"| {first / row['seconds']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def _load() -> str:
    return " ".join(f"{average:.1f}" for average in os.getloadavg())


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--rounds", type=int, default=9, help="timed calls a row (default: 9)")
    parser.add_argument("--output", type=Path, help="write OUTPUT.json and OUTPUT.md as well")
    arguments = parser.parse_args()
    facts = machine("cpu")
    before = _load()
    rows = measure(TOWER, TEXT, arguments.rounds)
    facts |= {"cores": os.cpu_count(), "load averages": f"{before} before, {_load()} after"}
    text = (
        "CLIP ViT-L/14 at 336 pixels with a projector, features of layer -2, and a language model of 8 "
        f"layers of width 1024 with {TEXT_TOKENS} tokens of text. Random weights, float32, batch 1, medians "
        f"of {arguments.rounds} calls that take turns. GMACs are those of the tower, with its last layer, "
        f"which no feature needs. Nothing here was measured on a GPU.\n\n{table(rows)}"
    )
    print(text)
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        everything = {"machine": facts, **rows}
        arguments.output.with_suffix(".json").write_text(json.dumps(everything, indent=1) + "\n")
        heading = "# Vision towers on the CPU\n\n"
        heading += "".join(f"- {name}: {fact}\n" for name, fact in facts.items())
        arguments.output.with_suffix(".md").write_text(f"{heading}\n{text}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
