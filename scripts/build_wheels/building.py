"""Builds the source distribution and, from it, wheels, and tries each."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from pathlib import Path

from .auditing import (
    check_contents,
    check_metadata,
    check_torch_abi,
    check_variant,
    give_platform_tag,
    platform_tag,
)
from .commands import StepError, describe, run
from .interpreters import Interpreter, inspect
from .paths import ROOT, WORK
from .report import PASSED, Row

#: The local versions of the variants, as patterns of file names.
VARIANTS = {"cpu": "+cpu", "cuda": "+cu[0-9]*"}

# What is made in the tree and is no source.
_MADE_HERE = shutil.ignore_patterns(
    ".git", ".venv*", "build", "dist", "runs", "*.egg-info", "__pycache__", "*.so", "*_cache", ".hypothesis"
)
_SDIST = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"


class Builder:
    """Builds wheels from one source distribution, into the folder `output`."""

    def __init__(self, output: Path) -> None:
        """Build and check the source distribution; StepError where it cannot be, or is not sound."""
        self._output = output
        WORK.mkdir(parents=True, exist_ok=True)
        log = fresh_log("sdist")
        self._scratch = WORK / "scratch"
        shutil.rmtree(self._scratch, ignore_errors=True)
        copy, made = self._scratch / "tree", self._scratch / "sdist"
        shutil.copytree(ROOT, copy, ignore=_MADE_HERE)
        made.mkdir()
        # setup.py states its choices even here: this one needs no CUDA toolkit, and is of no variant.
        choices = {"FORCE_CUDA": "0", "EVIT_NAME_VARIANT": "0"}
        run([sys.executable, "-c", _SDIST, made], log, cwd=copy, environment=choices)
        (sdist,) = made.glob("*.tar.gz")
        check_metadata(sdist, log)
        self.sdist = Path(shutil.copy2(sdist, output))

    def environment(self, interpreter: Interpreter) -> Interpreter:
        """Return the interpreter if it has all that is needed, else one of an environment that has.

        Raises:
            StepError: the environment cannot be made.
        """
        if not interpreter.missing:
            return interpreter
        folder = WORK / f"environment-{interpreter.tag}"
        python = folder / "bin" / "python"
        if python.exists():  # of an earlier run
            kept = inspect(python)
            if not kept.missing and kept.full_version == interpreter.full_version:
                return kept
        lacking = ", ".join(interpreter.missing)
        print(f"Python {interpreter.full_version} lacks {lacking}: making {folder} …", flush=True)
        log = fresh_log(f"environment-{interpreter.tag}")
        shutil.rmtree(folder, ignore_errors=True)
        run([interpreter.path, "-m", "venv", folder], log)
        run([python, "-m", "pip", "install", "--upgrade", "pip", "wheel", *requirements()], log)
        return inspect(python)

    def wheel(self, environment: Interpreter, variant: str) -> Row:
        """Build, audit and try the wheel of a variant; one that passes is put into the output folder."""
        name = f"{environment.tag}-{variant}"
        log, folder = WORK / f"{name}.log", self._scratch / name
        stem = self.sdist.name.removesuffix(".tar.gz") + VARIANTS[variant]
        try:
            fresh_log(name)
            # One of an earlier run must not pass for one of this.
            for earlier in self._output.glob(f"{stem}-{environment.tag}-{environment.tag}-*.whl"):
                earlier.unlink()
            wheel = self._build(environment, variant, folder, log)
            tried = try_wheel(environment, wheel, variant, folder / "trial", log)
            self._put(wheel)
        except Exception as error:
            return Row(environment.full_version, variant, f"FAILED: {describe(error, log)}")
        size, tag = wheel.stat().st_size, platform_tag(wheel)
        shutil.rmtree(folder, ignore_errors=True)
        passed = f"{PASSED}, {tried['device']}"
        return Row(environment.full_version, variant, passed, wheel.name, size, tag, tried["torch"])

    def _put(self, wheel: Path) -> None:
        """Copy a wheel to the output folder, whole or not at all."""
        unfinished = self._output / f"{wheel.name}.unfinished"
        try:
            shutil.copy2(wheel, unfinished)
            unfinished.replace(self._output / wheel.name)
        finally:
            unfinished.unlink(missing_ok=True)

    def _build(self, environment: Interpreter, variant: str, folder: Path, log: Path) -> Path:
        """Return the wheel, built from the source distribution and audited."""
        shutil.rmtree(folder, ignore_errors=True)
        shutil.unpack_archive(self.sdist, folder)
        (source,) = folder.iterdir()
        wheel = ("-m", "pip", "wheel", "-v", "--no-build-isolation", "--no-deps", "--no-cache-dir")
        settings = {
            "FORCE_CUDA": "1" if variant == "cuda" else "0",
            "EVIT_NAME_VARIANT": "1",
            # ninja is found there.
            "PATH": f"{environment.path.parent}{os.pathsep}{os.environ.get('PATH', '')}",
        }
        into = ("--wheel-dir", folder / "built")
        run((environment.path, *wheel, *into, source), log, environment=settings)
        (built,) = (folder / "built").glob("*.whl")
        repaired = give_platform_tag(built, folder / "repaired", log)
        check_contents(repaired, source)
        check_variant(repaired, variant)
        check_metadata(repaired, log)
        check_torch_abi(repaired, folder / "unpacked", log)
        return repaired


def try_wheel(environment: Interpreter, wheel: Path, variant: str, folder: Path, log: Path) -> dict[str, str]:
    """Install the wheel into a fresh environment that sees the packages of another, and use it there.

    Returns what smoke.py says: "torch" and "device".

    Raises:
        StepError: something does not work.
    """
    run([environment.path, "-m", "venv", "--without-pip", folder], log)
    python = folder / "bin" / "python"
    (fresh,) = folder.glob("lib/python*/site-packages")
    # Behind its own packages. Nothing that is in those folders for startup is run: an evit_ext which is
    # installed there in editable mode stays out.
    (fresh / "packages.pth").write_text("\n".join(environment.packages) + "\n")
    install = ["-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index"]
    run([environment.path, *install, wheel], log)
    smoke = Path(__file__).with_name("smoke.py")
    version = wheel.name.split("-")[1]
    # -I: neither the current folder nor PYTHONPATH, where the source tree may be.
    output = run([python, "-I", smoke, folder, version, variant], log, cwd=folder)
    printed = run([folder / "bin" / "evit", "--version"], log, cwd=folder, environment={"PYTHONPATH": ""})
    if printed.split() != ["evit_ext", version]:
        raise StepError(f"evit --version: expected evit_ext {version}, got {printed.strip()!r}")
    facts: dict[str, str] = json.loads(output.strip().splitlines()[-1])
    return facts


def requirements() -> list[str]:
    """What building a wheel and using the package need, as pyproject.toml states it."""
    # No TOML reader before Python 3.11.
    text = (ROOT / "pyproject.toml").read_text()
    lists = re.findall(r"^(?:requires|dependencies) = (\[.*\])$", text, re.MULTILINE)
    return [requirement for found in lists for requirement in json.loads(found)]


def fresh_log(name: str) -> Path:
    """The log of a step, empty."""
    log = WORK / f"{name}.log"
    log.write_text("")
    return log
