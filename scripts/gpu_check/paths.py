"""Where things are: the source, and what is made of it."""

from __future__ import annotations

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
