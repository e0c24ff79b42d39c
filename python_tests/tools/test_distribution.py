"""What the wheel and the source distribution contain, and what they say of themselves.

They are built from a copy of the tree by setuptools' backend, with an empty file in the place of the compiled
module: what is in them does not depend on it, and nothing is compiled. `make wheels` builds real ones.
"""

from __future__ import annotations

import email.message
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
if not (ROOT / "setup.py").exists():
    pytest.skip("tests run without the source tree", allow_module_level=True)

#: Of the repository, what is in no source distribution: git, hooks and CI read it.
NOT_SHIPPED = (".ci/*", ".git*", ".pre-commit-config.yaml")
#: What setuptools adds to a source distribution.
GENERATED = ("PKG-INFO", "setup.cfg", "evit_ext.egg-info/*")
#: What is made in a tree and must be in no distribution.
DIRT = (
    "evit_ext/__pycache__/apply.cpython-311.pyc",
    "evit_ext/_C.cpython-39-x86_64-linux-gnu.so",
    "csrc/torch/left.so",
    "python_tests/__pycache__/conftest.cpython-311.pyc",
    "benchmarks/results/gpu-check-example.logs/build.log",
    "build/lib.linux-x86_64-cpython-39/evit_ext/patching/applying.py",
    "dist/evit_ext-0.0.1-cp39-cp39-linux_x86_64.whl",
    "runs/demo/metrics.json",
)

# argv: what to build, and the folder to put it into.
BUILD = """
import sys
from pathlib import Path
from torch.utils.cpp_extension import BuildExtension

def build_extensions(self):
    for extension in self.extensions:
        path = Path(self.get_ext_fullpath(extension.name))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()

BuildExtension.build_extensions = build_extensions
from setuptools import build_meta
getattr(build_meta, f"build_{sys.argv[1]}")(sys.argv[2])
"""


def build(kind: str, tree: Path, output: Path, **environment: str) -> Path:
    """Build the "sdist" or "wheel" of a tree, with an empty file in the place of the compiled module."""
    output.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", BUILD, kind, str(output)],
        cwd=tree,
        env={**os.environ, "FORCE_CUDA": "0", **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = output.iterdir()
    return file


def sources() -> list[str]:
    """The files of the repository or, in a source distribution, those that it came with."""
    if (ROOT / ".git").exists():
        git = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        return [name for name in listed.splitlines() if (ROOT / name).is_file()]
    names = (ROOT / "evit_ext.egg-info" / "SOURCES.txt").read_text().splitlines()
    return [name for name in names if not matches(name, GENERATED)]


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


class Distributions(NamedTuple):
    """`sdist` and `wheel` come from a copy of the tree, `unpacked` and `second_wheel` from the sdist."""

    sdist: Path
    wheel: Path
    unpacked: Path
    second_wheel: Path


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Distributions:
    folder = tmp_path_factory.mktemp("distributions")
    tree = folder / "tree"
    for name in sources():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, tree / name)
    for name in DIRT:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text("left by something else")
    sdist = build("sdist", tree, folder / "sdist")
    shutil.unpack_archive(sdist, folder / "unpacked")
    (unpacked,) = (folder / "unpacked").iterdir()
    wheel = build("wheel", tree, folder / "wheel")
    return Distributions(sdist, wheel, unpacked, build("wheel", unpacked, folder / "second-wheel"))


def wheel_files(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def metadata(wheel: Path) -> email.message.Message:
    files = wheel_files(wheel)
    (name,) = (name for name in files if name.endswith(".dist-info/METADATA"))
    return message_from_bytes(files[name])


def test_the_wheel_has_the_package_and_nothing_else(distributions: Distributions) -> None:
    files = set(wheel_files(distributions.wheel))
    info = "-".join(distributions.wheel.name.split("-")[:2]) + ".dist-info"
    about = {name for name in files if name.startswith(f"{info}/")}
    assert {name.removeprefix(f"{info}/") for name in about} == {
        "METADATA",
        "RECORD",
        "WHEEL",
        "entry_points.txt",
        "top_level.txt",
        "licenses/LICENSE",
    }
    extensions = {name for name in files if name.endswith(".so")}
    assert len(extensions) == 1
    assert extensions.pop().startswith(f"evit_ext/_C.{sys.implementation.cache_tag}-")
    package = {name for name in files - about if not name.endswith(".so")}
    # Every file of the folder: a module, a recipe or a page that packaging forgets is missed by users only.
    assert package == {name for name in sources() if name.startswith("evit_ext/")}
    for name in ("py.typed", "_C.pyi", "visualize/page.html", "training/recipes/imagenet-300.yaml"):
        assert f"evit_ext/{name}" in package


def test_the_source_distribution_has_the_repository(distributions: Distributions) -> None:
    with tarfile.open(distributions.sdist) as archive:
        members = [member for member in archive.getmembers() if not member.isdir()]
    assert all(member.isfile() for member in members)
    top = distributions.sdist.name.removesuffix(".tar.gz")
    names = {member.name.removeprefix(f"{top}/") for member in members}
    shipped = {name for name in names if not matches(name, GENERATED)}
    assert shipped == {name for name in sources() if not matches(name, NOT_SHIPPED)}


def test_a_wheel_of_the_source_distribution_is_the_same(distributions: Distributions) -> None:
    assert distributions.second_wheel.name == distributions.wheel.name
    assert wheel_files(distributions.second_wheel) == wheel_files(distributions.wheel)


def test_metadata(distributions: Distributions) -> None:
    said = metadata(distributions.wheel)
    assert said["Name"] == "evit_ext" and said["License-Expression"] == "Apache-2.0"
    assert said["Requires-Python"] == ">=3.10"
    assert said["Description-Content-Type"] == "text/markdown"
    readme = said.get_payload(decode=True)
    assert isinstance(readme, bytes) and readme.decode() == (ROOT / "README.md").read_text()
    core = [line for line in said.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert core == ["torch>=2.10", "timm>=1.0.15", "numpy", "pyyaml", "safetensors"]
    extras = set(said.get_all("Provides-Extra", []))
    assert {"demo", "train", "viz", "export", "data", "transformers", "bench", "test", "wheels"} <= extras
    files = wheel_files(distributions.wheel)
    (entry_points,) = (text for name, text in files.items() if name.endswith("/entry_points.txt"))
    assert entry_points.decode().split() == ["[console_scripts]", "evit", "=", "evit_ext.cli:main"]


def test_the_version_names_the_variant(distributions: Distributions, tmp_path: Path) -> None:
    """From the source distribution, whose setup.cfg says that there is no local version."""
    tree = shutil.copytree(distributions.unpacked, tmp_path / "tree")
    wheel = build("wheel", tree, tmp_path / "wheel", EVIT_NAME_VARIANT="1")
    version = metadata(distributions.wheel)["Version"]
    assert metadata(wheel)["Version"] == f"{version}+cpu"
    assert wheel.name.startswith(f"evit_ext-{version}+cpu-")


def test_the_citation_names_the_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = (ROOT / "pyproject.toml").read_text()
    assert f'\nversion = "{citation["version"]}"\n' in project
