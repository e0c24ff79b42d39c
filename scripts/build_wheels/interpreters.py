"""Finds the Pythons of a machine."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

#: The CPythons that wheels are built for.
VERSIONS = ("3.10", "3.11", "3.12", "3.13", "3.14")

#: Printed by the Python in question.
_FACTS = """
import importlib.metadata, importlib.util, json, os, platform, sys, sysconfig
names = ("torch", "timm", "numpy", "yaml", "safetensors", "setuptools", "wheel", "ninja", "pybind11", "pip")
missing = [name for name in names if importlib.util.find_spec(name) is None]
if "setuptools" not in missing and int(importlib.metadata.version("setuptools").split(".")[0]) < 77:
    missing.append("setuptools 77")  # the first that knows a license expression
print(json.dumps({
    "full_version": platform.python_version(),
    "version": "%d.%d" % sys.version_info[:2],
    "cpython": platform.python_implementation() == "CPython",
    "free_threaded": bool(sysconfig.get_config_var("Py_GIL_DISABLED")),
    "headers": os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")),
    "missing": missing,
    "packages": [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))],
}))
"""


class NotFoundError(Exception):
    """There is no such Python; says where it was looked for, or what it lacks."""


@dataclass(frozen=True)
class Interpreter:
    """A CPython that extension modules can be built for."""

    path: Path
    version: str  # "3.12"
    full_version: str  # "3.12.1"
    missing: tuple[str, ...]  # what building and trying a wheel need, and it does not have
    packages: tuple[str, ...]  # folders of its packages

    @property
    def tag(self) -> str:
        return "cp" + self.version.replace(".", "")


def inspect(path: str | Path) -> Interpreter:
    """Return what the Python at `path` is.

    Raises:
        NotFoundError: it cannot be run, is too old, is no CPython with a GIL, or has no headers.
    """
    try:
        # By standard input: what is no Python would repeat all of an argument.
        command = [str(path), "-I", "-"]
        done = subprocess.run(command, input=_FACTS, capture_output=True, text=True, timeout=60)
        facts = json.loads(done.stdout)
    except OSError as error:
        raise NotFoundError(f"{path} is no Python that runs: {error.strerror}") from error
    except subprocess.TimeoutExpired as error:
        raise NotFoundError(f"{path} is no Python that runs: no answer in a minute") from error
    except ValueError as error:
        said = done.stderr.strip().splitlines() or ["no answer"]
        line = said[-1] if said[0].startswith("Traceback") else said[0]
        raise NotFoundError(f"{path} is no Python that runs: {line}") from error
    if not facts["cpython"] or facts["free_threaded"]:
        raise NotFoundError(f"{path} is not CPython with its global lock, for which wheels are built")
    oldest = VERSIONS[0]
    if [int(part) for part in facts["version"].split(".")] < [int(part) for part in oldest.split(".")]:
        raise NotFoundError(f"{path} is Python {facts['full_version']}, {oldest} or newer is needed")
    if not facts["headers"]:
        raise NotFoundError(f"{path} is Python {facts['full_version']} without its headers (python3-dev)")
    return Interpreter(
        Path(path).absolute(),  # not resolved: an environment's Python is a link out of it
        facts["version"],
        facts["full_version"],
        tuple(facts["missing"]),
        tuple(facts["packages"]),
    )


def find(wanted: str) -> Interpreter:
    """Return the Python of a version such as "3.12", or at a path.

    Raises:
        NotFoundError: there is none, or none that extension modules can be built for.
    """
    if not re.fullmatch(r"\d+\.\d+", wanted):
        return inspect(Path(wanted).expanduser())
    reasons = []
    for path in candidates(wanted):
        try:
            found = inspect(path)
        except NotFoundError as error:
            reasons.append(str(error))
            continue
        if found.version == wanted:
            return found
    places = "this Python, PATH, /opt/python, pyenv's and uv's folders"
    raise NotFoundError("; ".join(dict.fromkeys(reasons)) or f"no Python {wanted} in {places}: see --python")


def candidates(version: str) -> Iterator[Path]:
    """Paths where a Python of a version may be, the likeliest first: the running one has torch already."""
    if version == f"{sys.version_info.major}.{sys.version_info.minor}":
        yield Path(sys.executable)
    on_path = shutil.which(f"python{version}")
    if on_path:
        yield Path(on_path)
    tag = "cp" + version.replace(".", "")
    home = Path.home()
    pyenv = Path(os.environ.get("PYENV_ROOT", home / ".pyenv"))
    for folder, pattern in (
        (Path("/opt/python"), f"{tag}-{tag}/bin/python"),  # of the manylinux images
        (pyenv / "versions", f"{version}.*/bin/python"),
        (home / ".local" / "share" / "uv" / "python", f"cpython-{version}.*/bin/python{version}"),
    ):
        yield from sorted(folder.glob(pattern), key=_numbers, reverse=True)


def _numbers(path: Path) -> list[int]:
    """For sorting: 3.12.10 comes after 3.12.9."""
    return [int(number) for number in re.findall(r"\d+", str(path))]
