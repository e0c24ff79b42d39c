#!/usr/bin/env python3
"""Build, audit and try wheels, from the source distribution, for several Pythons, with CUDA code and without.

    scripts/build-wheels.py
    scripts/build-wheels.py --python 3.12 --python ~/env/bin/python --variant cpu

For each Python and variant: the wheel is built from the source distribution, given the manylinux tag that its
symbols allow (auditwheel; torch's libraries are the user's and are not bundled), checked (contents, metadata,
torch's stable ABI only) and installed into a fresh environment, where operators and a model run. A table says
what became of each. The files are called evit_ext-VERSION+cpu… and evit_ext-VERSION+cu130…, as torch's are.

A Python that has torch, timm and what the build needs is used as it is. For any other an environment is made
in build/wheels, with the newest torch, which is several GB. The tag depends on the machine: built in a
manylinux image, whose Pythons in /opt/python are found, a wheel runs on more systems than built elsewhere.

The CUDA variant needs a CUDA toolkit of torch's major version (CUDA_HOME); TORCH_CUDA_ARCH_LIST names other
architectures than those of csrc/build.json, MAX_JOBS limits the parallel jobs. The script itself needs what
`pip install "evit_ext[wheels]"` installs.

Exit status: 0 every wheel passed, 1 one did not or its Python was not found, 2 bad input, 130 interrupted.
The table has a line for each wheel, whatever happens to one of them.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from build_wheels.building import VARIANTS, Builder
from build_wheels.commands import describe
from build_wheels.interpreters import VERSIONS, NotFoundError, find
from build_wheels.paths import ROOT, WORK
from build_wheels.report import Row, table, verdict

#: The modules of the extra `wheels`, by the package that has each.
TOOLS = {
    "auditwheel": "auditwheel",
    "torch-abi-audit": "torch_abi_audit",
    "twine": "twine",
}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--python",
        action="append",
        metavar="VERSION|PATH",
        help=f"a version to look for or a Python's path; may be repeated (default: {', '.join(VERSIONS)})",
    )
    parser.add_argument(
        "--variant",
        action="append",
        choices=VARIANTS,
        help="may be repeated (default: cpu and cuda)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=ROOT / "dist",
        metavar="DIR",
        help="folder of the source distribution and of the wheels that passed (default: dist)",
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    missing = [package for package, module in TOOLS.items() if importlib.util.find_spec(module) is None]
    if missing:
        print(
            f"build-wheels: error: {', '.join(missing)} not installed: `make wheels` installs what this "
            'needs, or pip install "evit_ext[wheels]"',
            file=sys.stderr,
        )
        return 2
    output = options.output.resolve()
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"build-wheels: error: no output folder {output}: {error.strerror}", file=sys.stderr)
        return 2
    try:
        builder = Builder(output)
    except Exception as error:
        said = describe(error, WORK / "sdist.log")
        print(f"build-wheels: error: no source distribution: {said}", file=sys.stderr)
        return 1
    print(f"{builder.sdist.name}: built and checked", flush=True)
    pythons = list(dict.fromkeys(options.python or VERSIONS))
    variants = list(dict.fromkeys(options.variant or VARIANTS))
    rows: list[Row] = []
    interrupted = False
    try:
        for row in build(builder, pythons, variants):
            rows.append(row)
    except KeyboardInterrupt:
        interrupted = True
        wanted = [(python, variant) for python in pythons for variant in variants]
        rows += [Row(python, variant, "NOT BUILT: interrupted") for python, variant in wanted[len(rows) :]]
    print(f"\n{table(rows)}\n\n{verdict(rows)}; in {output}, logs in {WORK}")
    if interrupted:
        return 130
    return 0 if all(row.passed for row in rows) else 1


def build(builder: Builder, pythons: Sequence[str], variants: Sequence[str]) -> Iterator[Row]:
    """Yield what became of each Python's wheels, in order, whatever happens to one of them."""
    for wanted in pythons:
        try:
            interpreter = find(wanted)
            environment = builder.environment(interpreter)
        except Exception as error:
            said = str(error) if isinstance(error, NotFoundError) else describe(error, WORK / "pythons.log")
            print(f"build-wheels: Python {wanted}: {said}", file=sys.stderr, flush=True)
            yield from (Row(wanted, variant, verdict=f"NOT BUILT: {said}") for variant in variants)
            continue
        for variant in variants:
            print(f"Python {interpreter.full_version}, {variant} …", flush=True)
            row = builder.wheel(environment, variant)
            print(f"  {row.verdict}", flush=True)
            yield row


if __name__ == "__main__":
    sys.exit(main())
