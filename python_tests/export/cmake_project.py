"""Runs CMake for the tests of what is built outside of Python."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

#: The tools and the python3 of this environment come first: tests are also run without it being activated.
PATH = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)))


def cmake(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run CMake; skips, with the reason, where there is none."""
    for tool in ("cmake", "ninja"):
        if shutil.which(tool, path=PATH) is None:
            pytest.skip(f"{tool} is not installed: pip install {tool}")
    command = [str(shutil.which("cmake", path=PATH)), *map(str, arguments)]
    # What is meant for other projects of this machine should not tell here.
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith(("CMAKE_", "Torch_"))
    }
    return subprocess.run(command, env={**environment, "PATH": PATH}, capture_output=True, text=True)


def run_cmake(*arguments: object) -> None:
    """Run CMake, which must succeed."""
    done = cmake(*arguments)
    assert done.returncode == 0, f"cmake {arguments}:\n{done.stdout}\n{done.stderr}"


def write_project(folder: Path, lists: str, source: str) -> None:
    """Write a project of one source file, main.cpp."""
    folder.mkdir()
    first = "cmake_minimum_required(VERSION 3.20)\nproject(test_of_evit LANGUAGES CXX)\n"
    (folder / "CMakeLists.txt").write_text(first + lists)
    (folder / "main.cpp").write_text(source)


def configure(source: Path, prefixes: object, *options: object) -> subprocess.CompletedProcess[str]:
    """Configure a project, in its folder build; `prefixes` is CMAKE_PREFIX_PATH."""
    where = ("-S", source, "-B", source / "build", "-G", "Ninja")
    return cmake(*where, f"-DCMAKE_PREFIX_PATH={prefixes}", *options)
