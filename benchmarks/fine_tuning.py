"""What a linear head says of reduced tokens on real weights, before and after a short fine-tuning.

    python benchmarks/fine_tuning.py --output benchmarks/results/fine-tuning-cpu

Model, pictures and splits are those of real_weights.py. A head, by logistic regression, learns the classes
of a split's index from the full model's embeddings, or from the reduced model's own; or it is fine-tuned
together with all weights, the full model alike. What counts is top-1 of the queries.

Exit status 77 says that something could not be downloaded; the reason is printed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # for study, which is not installed

from operator_times.facts import machine  # noqa: E402
from retrieval import downloads, heads, page, pictures, weights  # noqa: E402
from retrieval.reductions import SIDE, build  # noqa: E402

#: Exit status where something was left out.
SKIPPED = 77


def main() -> int:
    """Download, train, measure, print, and write where asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    default = ROOT / "build" / "real-weights"
    parser.add_argument("--downloads", type=Path, default=default, help="folder of downloads, which are kept")
    parser.add_argument("--splits", type=int, default=5, help="into index and queries (default: 5)")
    parser.add_argument("--epochs", type=int, default=heads.EPOCHS, help=f"(default: {heads.EPOCHS})")
    parser.add_argument("--output", type=Path, metavar="STEM", help="write STEM.json and STEM.md, too")
    options = parser.parse_args()
    if options.splits < 2:
        parser.error(f"--splits must be 2 or more, as intervals need, got {options.splits}")
    facts, begin = machine("cpu"), time.monotonic()
    try:
        file = downloads.onnx_file(options.downloads)
    except downloads.Unavailable as reason:
        print(f"skipped, as there are no weights: {reason}", file=sys.stderr)
        return SKIPPED
    full = build()
    full.load_state_dict(weights.state_dict(file, SIDE))
    sets, missing = pictures.find(options.downloads, SIDE)
    for reason in missing:
        print(f"left out: {reason}", file=sys.stderr)
    results: dict[str, Any] = {"machine": {**facts, "threads": torch.get_num_threads()}, "left out": missing}
    results |= {"wheel": downloads.WHEEL, "sets": {}}
    for name, found in sets.items():
        measured = heads.measure(full, found, options.splits, options.epochs)
        results["sets"][f"{len(found.images)} {name}, {len(found.classes)} classes"] = measured
        results["machine"]["minutes"] = round((time.monotonic() - begin) / 60, 1)
        if options.output is not None:  # after each set, as they take long
            options.output.parent.mkdir(parents=True, exist_ok=True)
            options.output.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
            options.output.with_suffix(".md").write_text(page.of_heads(results))
    print(page.of_heads(results))
    return SKIPPED if missing else 0


if __name__ == "__main__":
    sys.exit(main())
