"""What `import evit_ext` gives: public names, packages that are imported when first used, or an error."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import evit_ext

LAZY = ("benchmark", "data", "export", "towers", "training", "visualize")


def run(program: str) -> str:
    """What a fresh Python prints that runs `program`."""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_star_import_gives_the_public_names() -> None:
    names: dict[str, object] = {}
    exec("from evit_ext import *", names)
    assert set(names) - {"__builtins__"} == set(evit_ext.__all__)


def test_packages_are_imported_when_first_used() -> None:
    printed = run(
        "import sys, evit_ext\n"
        f"lazy = {LAZY}\n"
        "print([name for name in lazy if f'evit_ext.{name}' in sys.modules])\n"
        "print([getattr(evit_ext, name).__name__ for name in lazy])\n"
        "print(set(lazy) <= set(dir(evit_ext)))\n"
    )
    assert printed.splitlines() == ["[]", str([f"evit_ext.{name}" for name in LAZY]), "True"]


@pytest.mark.parametrize("package", ["data", "training"])
def test_names_that_are_imported_when_asked_for(package: str) -> None:
    """A module of the same name would hide one once it is imported; stars and dir() know them all."""
    lazy = importlib.import_module(f"evit_ext.{package}")
    modules = {module.name for module in pkgutil.iter_modules(lazy.__path__)}
    assert not modules & set(lazy.__all__)
    names: dict[str, object] = {}
    exec(f"from evit_ext.{package} import *", names)
    assert set(names) - {"__builtins__"} == set(lazy.__all__) <= set(dir(lazy))
    with pytest.raises(AttributeError, match=f"module 'evit_ext.{package}' has no attribute 'nothing'"):
        lazy.nothing  # noqa: B018


def test_the_command_imports_torch_when_it_needs_it() -> None:
    program = (
        "import sys; sys.argv[0] = 'bin/evit'\n"
        "import evit_ext; print('torch' in sys.modules)\n"
        "import timm; from evit_ext import apply, models\n"
        "print(apply is evit_ext.apply, timm.is_model('evit_deit_tiny_patch16_224'))\n"
    )
    assert run(program).splitlines() == ["False", "True True"]


def test_unknown_names() -> None:
    with pytest.raises(AttributeError, match="module 'evit_ext' has no attribute 'traning'"):
        evit_ext.traning  # noqa: B018


def test_a_missing_compiled_module_says_what_to_do() -> None:
    """As in a clone that is not installed in editable mode."""
    hidden = "import sys; sys.modules['evit_ext._C'] = None; import evit_ext"
    done = subprocess.run([sys.executable, "-c", hidden], capture_output=True, text=True)
    assert done.returncode == 1
    assert "ImportError: the compiled module evit_ext._C cannot be imported (" in done.stderr
    assert done.stderr.rstrip().endswith("pip install --no-build-isolation --editable .")


def test_another_packages_module_finds_the_models(tmp_path: Path) -> None:
    """``python -m`` calls any program -m while it looks for the module, not this command alone."""
    (tmp_path / "other").mkdir()
    (tmp_path / "other/__init__.py").write_text("import evit_ext\n")
    (tmp_path / "other/main.py").write_text(
        "import timm\nprint(timm.is_model('evit_deit_small_patch16_224'))\n"
    )
    command = [sys.executable, "-m", "other.main"]
    assert (
        subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout == "True\n"
    )
