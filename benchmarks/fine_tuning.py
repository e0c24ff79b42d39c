"""What a linear head says of reduced tokens on real weights, before and after a short fine-tuning.

    python benchmarks/fine_tuning.py --output benchmarks/results/fine-tuning-cpu

Model, pictures and splits are those of real_weights.py. A head, by logistic regression, learns the classes
of a split's index from the full model's embeddings, or from the reduced model's own; or it is fine-tuned
together with all weights, the full model alike. What counts is top-1 of the queries.

Exit status 77 says that something could not be downloaded; the reason is printed.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for study, which is not installed

from operator_times.facts import machine
from retrieval import downloads, heads, inputs, page


def main() -> int:
    """Download, train, measure, print, and write where asked."""
    parser = inputs.parser(__doc__)
    parser.add_argument("--epochs", type=int, default=heads.EPOCHS, help=f"(default: {heads.EPOCHS})")
    options = parser.parse_args()
    begin = time.monotonic()
    if (found := inputs.load(options.downloads)) is None:
        return inputs.SKIPPED
    facts = {**machine("cpu"), "threads": torch.get_num_threads()}
    results: dict[str, Any] = {
        "machine": facts,
        "left out": found.missing,
        "wheel": downloads.WHEEL,
        "sets": {},
    }
    for name, some in found.sets.items():
        measured = heads.measure(found.full, some, options.splits, options.epochs)
        results["sets"][f"{len(some.images)} {name}, {len(some.classes)} classes"] = measured
        facts["minutes"] = round((time.monotonic() - begin) / 60, 1)
        inputs.write(options.output, results, page.of_heads(results))  # after each set, as they take long
    print(page.of_heads(results))
    return inputs.SKIPPED if found.missing else 0


if __name__ == "__main__":
    sys.exit(main())
