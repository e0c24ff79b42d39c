"""Where things are: the source, and what is made of it."""

from __future__ import annotations

import filecmp
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "build" / "gpu-check"
SOURCE = WORK / "source"
SITE = WORK / "site"
CMAKE = WORK / "cmake"

#: What the package is made from.
PACKAGE_FILES = (
    "csrc",
    "evit_ext",
    "LICENSE",
    "MANIFEST.in",
    "README.md",
    "pyproject.toml",
    "setup.py",
)


def start_afresh() -> None:
    """Nothing of an earlier run may pass for a result of this one, nor anything built for another torch.

    setuptools builds in the source tree, in build/, and takes what lies there for up to date, whichever torch
    it was built with: so the package is built from a copy of its sources alone.
    """
    for folder in (SOURCE, SITE, CMAKE):
        shutil.rmtree(folder, ignore_errors=True)
    SOURCE.mkdir(parents=True)
    built = shutil.ignore_patterns("__pycache__", "*.so")
    for name in PACKAGE_FILES:
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, SOURCE / name, ignore=built)
        else:
            shutil.copy2(path, SOURCE / name)


def built_from_these_sources() -> bool:
    """Whether SITE holds a package that was built from the sources as they are now.

    `start_afresh` has removed both SITE and SOURCE, and pip fills SITE when all is built.
    """
    if not list((SITE / "evit_ext").glob("_C*.so")):
        return False
    names = [path.relative_to(ROOT) for name in PACKAGE_FILES for path in _files(ROOT / name)]
    of_copy = [path.relative_to(SOURCE) for name in PACKAGE_FILES for path in _files(SOURCE / name)]
    return sorted(names) == sorted(of_copy) and all(
        filecmp.cmp(ROOT / name, SOURCE / name, shallow=False) for name in names
    )


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    files = [file for file in path.rglob("*") if file.is_file()]
    return [file for file in files if "__pycache__" not in file.parts and file.suffix != ".so"]
