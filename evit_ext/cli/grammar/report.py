"""The options of ``evit report``."""

from __future__ import annotations

import argparse
from typing import Any

from evit_ext.cli.options import add_device, add_output

_EXAMPLES = """examples:
  evit report runs/photos
  evit report runs/photos -o photos.html --images 24
  evit report runs/photos --images 0               # curves only, without running the model
"""


def add_parser(commands: Any) -> None:
    """Add ``evit report`` to the commands."""
    parser = commands.add_parser(
        "report",
        help="curves and pictures of a run as one HTML file, which needs no network",
        description="Write a page with the run's loss, accuracy, keep rate, learning rate and throughput,\n"
        "the patches that its model keeps of some validation images, and the images that could\n"
        "not be read. It works while the run goes on, too.",
        usage="evit report RUN [-o FILE] [--images N] [OPTION ...]",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run_folder", metavar="RUN", help="folder of a run of evit train")
    add_output(parser, "FILE", "(default: report.html in the run's folder)")
    parser.add_argument(
        "--images", type=int, default=12, metavar="N", help="validation images to show (default: 12)"
    )
    parser.add_argument("--last", action="store_true", help="show what the last weights keep, not the best")
    add_device(parser)
    parser.set_defaults(run="evit_ext.cli.report")
