"""The options of ``evit info``."""

from __future__ import annotations

import argparse
from typing import Any

from evit_ext._util.choices import SCHEDULES
from evit_ext.cli.options import add_keep_rates, add_output

_EXAMPLES = """examples:
  evit info
  evit info deit_small                                   # layer by layer, and at several keep rates
  evit info vit_base_patch16_224 --keep-rate 0.5 --img-size 384
  evit info deit_small dynamicvit_small lvvit_small      # side by side
  evit info deit_small --budget 4.6                      # sizes of images and keep rates for 4.6 GMACs
  evit info deit_small --budget 3 --schedule rising --drop-loc 3 5 7 9
  evit info deit_small --budget deit_small               # … for what DeiT-S costs with all patches
"""


def add_parser(commands: Any) -> None:
    """Add ``evit info`` to the commands."""
    parser = commands.add_parser(
        "info",
        help="what a model costs, layer by layer; what fits a budget; what was built",
        description="Print of one model its layers, tokens, parameters and multiply-accumulates (MACs), of\n"
        "several what they cost side by side, and of none how evit_ext was built. Nothing is\n"
        "computed or downloaded: the models are built on the meta device, without memory.",
        usage="evit info [MODEL ...] [--keep-rate RATE ...] [--budget GMACS|MODEL] [OPTION ...]",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "models",
        nargs="*",
        metavar="MODEL",
        help="of evit_ext.models, or any of timm's that evit_ext.apply supports (default: deit_small and "
        "dynamicvit_small)",
    )
    add_keep_rates(
        parser,
        "each in (0, 1]; layers are shown for the first (default: 1 0.9 0.8 0.7 0.6 0.5, layers for the "
        "model's own; with --budget those in steps of 0.05)",
    )
    parser.add_argument("--img-size", type=int, metavar="N", help="of square images (default: the model's)")
    parser.add_argument(
        "--budget",
        metavar="GMACS|MODEL",
        help="list the sizes of images and, for each, the highest keep rate that cost at most so many 10^9 "
        "MACs, or what another model costs with all patches",
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        metavar="PERCENT",
        help="by how much a cost may be above the budget (default: 1)",
    )
    parser.add_argument(
        "--schedule",
        choices=SCHEDULES,
        help="instead, find keep rates that fit the budget: the same share dropped in each block, or more in "
        "later (rising) or in earlier ones (falling)",
    )
    parser.add_argument(
        "--drop-loc",
        nargs="+",
        type=int,
        metavar="N",
        help="numbers of the blocks of the schedule (default: those at the quarters of the depth)",
    )
    add_output(parser, "FILE", "write all of it there, too, as JSON")
    parser.add_argument("--json", action="store_true", help="print all of it as JSON")
    parser.set_defaults(run="evit_ext.cli.info")
