"""With the package's own dependencies alone, what needs no more works, and what does names its extra.

No environment is made: a process is started in which every package is hidden that the dependencies, and
theirs, do not bring.
"""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, packages_distributions, requires

import pytest

pytest.importorskip("packaging", reason="requirements are read by packaging, which is not installed")
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from PIL import Image

#: Commands that need no more than the core.
WORKING = (
    ("--help",),
    ("info", "deit_tiny"),
    ("train", "--recipe", "imagenet-300", "--print-config"),
    (
        "visualize",
        "photo.png",
        "--model",
        "deit_tiny",
        "--random-weights",
        "-o",
        "kept.png",
        "--html",
        "kept.html",
    ),
)
#: Commands that need more, and the extra that has it.
NEEDING = {
    ("train", "--recipe", "cluttered-digits"): "demo",
    ("train", "--dataset", "wds", "--data", ".", "--train-split", "a|1", "--val-split", "a|1"): "data",
    ("train", "--dataset", "hfds/beans", "--data", "."): "data",
    ("export", "deit_tiny", "--random-weights", "--format", "onnx"): "export",
}

# argv: the hidden modules and the commands, as JSON. Prints what became of each command: its exit status and
# what it wrote to standard error. To look for a hidden module finds none, as where it is not installed.
PROGRAM = """
import contextlib, io, json, sys
from importlib.machinery import PathFinder

hidden = set(json.loads(sys.argv[1]))

class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in hidden else super().find_spec(name, path, target)

sys.meta_path = [Finder if finder is PathFinder else finder for finder in sys.meta_path]

import evit_ext, evit_ext.export, evit_ext.training, evit_ext.visualize
from evit_ext.cli import main
from evit_ext.demo.__main__ import main as demo
from evit_ext.training.run.metrics import Metrics

def events(arguments):
    Metrics("metrics", tensorboard="auto").close()
    Metrics("metrics", tensorboard=True)

outcomes = []
for command in json.loads(sys.argv[2]):
    run = {"demo": lambda _: demo([]), "tensorboard": events}.get(command[0], main)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = run(command)
        except SystemExit as exit_:
            status = exit_.code or 0
        except Exception as error:
            status = f"{type(error).__name__}: {error}"
    outcomes.append([command, status, err.getvalue()])
print(json.dumps(outcomes))
"""


def brought_by(distribution: str, extra: str = "") -> set[str]:
    """The distributions that installing one brings, itself among them."""
    brought: set[tuple[str, str]] = set()
    todo = [(canonicalize_name(distribution), extra)]
    while todo:
        name, extra = todo.pop()
        if (name, extra) in brought:
            continue
        try:
            needed = requires(name) or []
        except PackageNotFoundError:
            continue  # for another system
        brought.add((name, extra))
        for requirement in map(Requirement, needed):
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                todo += [(canonicalize_name(requirement.name), e) for e in ("", *requirement.extras)]
    return {name for name, _ in brought}


@pytest.fixture(scope="module")
def hidden() -> list[str]:
    """Modules of the packages that are here, but would not be with the core alone."""
    core = brought_by("evit_ext")
    assert {"torch", "timm", "numpy", "pyyaml", "safetensors"} <= core
    modules = packages_distributions()
    return [name for name, owners in modules.items() if not core & {canonicalize_name(o) for o in owners}]


Outcomes = dict[tuple[str, ...], tuple[int | str, str]]


@pytest.fixture(scope="module")
def outcomes(hidden: list[str], tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """The exit status of each command and what it wrote to standard error."""
    folder = tmp_path_factory.mktemp("core")
    Image.new("RGB", (40, 30), "orange").save(folder / "photo.png")
    commands = json.dumps([*WORKING, *NEEDING, ("demo",), ("tensorboard",)])
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(hidden), commands],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return {
        tuple(command): (status, err) for command, status, err in json.loads(done.stdout.splitlines()[-1])
    }


def test_the_core_is_small(hidden: list[str]) -> None:
    extras = {"sklearn", "matplotlib", "tensorboard", "transformers", "datasets", "webdataset"}
    assert extras | {"onnx", "onnxscript", "onnxruntime", "pytest", "pybind11"} <= set(hidden)


@pytest.mark.parametrize("command", WORKING, ids=lambda command: " ".join(command[:2]))
def test_works(outcomes: Outcomes, command: tuple[str, ...]) -> None:
    status, err = outcomes[command]
    assert status == 0, err


@pytest.mark.parametrize(
    ("command", "extra"), NEEDING.items(), ids=["digits", "webdataset", "datasets", "onnx"]
)
def test_names_the_extra(outcomes: Outcomes, command: tuple[str, ...], extra: str) -> None:
    status, err = outcomes[command]
    assert status == 2, err
    (line,) = err.splitlines()
    assert line.startswith("evit: error: ") and f"evit_ext[{extra}]" in line


def test_the_demo_names_the_extra(outcomes: Outcomes) -> None:
    said = " ".join(map(str, outcomes["demo",]))
    assert 'the demo needs scikit-learn: pip install "evit_ext[demo]"' in said


def test_tensorboard_names_the_extra(outcomes: Outcomes) -> None:
    status, _ = outcomes["tensorboard",]
    assert str(status).startswith("RuntimeError: TensorBoard's events are to be written")
    assert 'pip install "evit_ext[train]"' in str(status)
