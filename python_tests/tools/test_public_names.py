"""What `import evit_ext` gives: public names, packages that are imported when first used, or an error."""

from __future__ import annotations

import subprocess
import sys

import pytest

import evit_ext

LAZY = ("benchmark", "data", "export", "training", "visualize")


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
