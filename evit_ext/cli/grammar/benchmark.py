"""The options of ``evit benchmark``."""

from __future__ import annotations

import argparse
from typing import Any

from evit_ext._util.choices import ENGINES, MODES, TASKS
from evit_ext.cli.options import add_device, add_output, add_progress, engine, keep_rate
from evit_ext.training.config import PRECISIONS

#: Calls at batch 1, where latency matters: the fewest that have a 99th percentile.
LATENCY_CALLS = 100

_EXAMPLES = """examples:
  evit benchmark deit_small
  evit benchmark vit_base_patch16_224 --batch-size 1 16 --precision bfloat16 --mode eager compile
  evit benchmark deit_small --engine torch torch-compile onnxruntime openvino --precision float32 int8
  evit benchmark deit_small --task training --batch-size 16 --output results/deit-small
"""


def add_parser(commands: Any) -> None:
    """Add ``evit benchmark`` to the commands."""
    parser = commands.add_parser(
        "benchmark",
        help="speed of a model, dense and at several keep rates, side by side",
        usage="evit benchmark [RUN|MODEL] [--keep-rate RATE ...] [--batch-size N ...] [OPTION ...]",
        description="Time a model and what drops patches of it, in turns, so that what else happens on the\n"
        "machine happens to all. Weights and images are random: they do not change how long\n"
        "it takes. In the table, ms is the median time of a call, MiB what a call needs at its\n"
        "peak beyond what is there before it, and a dash what is not measured.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "named",
        nargs="?",
        default="deit_small",
        metavar="RUN|MODEL",
        help="folder of a run, whose model and keep rate are timed; or a model: of evit_ext.models, or any "
        "of timm's that evit_ext.apply supports (default: deit_small)",
    )
    parser.add_argument(
        "--keep-rate",
        nargs="+",
        type=keep_rate,
        metavar="RATE",
        help="(default: 0.7 0.5; of a run its own)",
    )
    parser.add_argument(
        "--batch-size", nargs="+", type=int, metavar="N", help="(default: 1 4 16; on a GPU 1 8 64 256)"
    )
    parser.add_argument(
        "--engine",
        nargs="+",
        type=engine,
        metavar="NAME",
        help=f"what runs the models on the CPU, side by side: {', '.join(ENGINES)}; what one does not "
        "compute in is said to be not available (default: torch)",
    )
    parser.add_argument(
        "--precision",
        nargs="+",
        choices=(*PRECISIONS, "int8"),
        default=["float32", "bfloat16"],
        help="of weights and images, in training of autocast; int8 with --engine onnxruntime and openvino "
        "(default: float32 bfloat16)",
    )
    parser.add_argument(
        "--mode",
        nargs="+",
        choices=MODES,
        default=["eager"],
        help="as it is, by torch.compile, or from a CUDA graph (default: eager)",
    )
    parser.add_argument(
        "--task",
        nargs="+",
        choices=TASKS,
        default=["inference"],
        help="a forward, or a whole step with AdamW (default: inference)",
    )
    parser.add_argument(
        "--img-size", type=int, metavar="N", help="of square images (default: the model's own)"
    )
    add_device(parser)
    parser.add_argument("--threads", type=int, metavar="N", help="of the CPU (default: torch's own choice)")
    parser.add_argument(
        "--seconds", type=float, default=5.0, metavar="N", help="for each group of rows (default: 5)"
    )
    parser.add_argument(
        "--latency-calls",
        type=int,
        default=LATENCY_CALLS,
        metavar="N",
        help="at least, of each model at batch 1 in inference (default: 100, for the 99th percentile)",
    )
    add_output(parser, "STEM", "write STEM.json and STEM.md, too")
    add_progress(parser)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.set_defaults(run="evit_ext.cli.benchmark")
