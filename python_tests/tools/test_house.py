"""The house: no circle of imports, type checkers' included, and no function named like a module."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path

import evit_ext

PACKAGE = Path(evit_ext.__file__).parent


def name_of(file: Path) -> str:
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(file): file for file in PACKAGE.rglob("*.py")}


def imported(module: str) -> set[str]:
    """The modules of the package that a module imports, wherever in its code."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                if inner != "evit_ext._C":  # compiled
                    found.add(inner if inner in MODULES else node.module)
    return {name for name in found if name in MODULES and name != module}


def room(module: str) -> str:
    """A module's folder below the package, or the module itself."""
    return ".".join(module.split(".")[:2])


def circles(group: Callable[[str], str]) -> list[list[str]]:
    """Groups of modules that need each other; __init__ of a group counts as part of it."""
    arrows: dict[str, set[str]] = {}
    for module in MODULES:
        arrows.setdefault(group(module), set()).update(group(name) for name in imported(module))
    found: list[list[str]] = []

    def visit(name: str, path: list[str], done: set[str]) -> None:
        if name in path:
            found.append(path[path.index(name) :])
            return
        if name in done:
            return
        for other in sorted(arrows[name] - {name}):
            visit(other, [*path, name], done)
        done.add(name)

    done: set[str] = set()
    for name in sorted(arrows):
        visit(name, [], done)
    return found


def test_no_module_needs_one_that_needs_it() -> None:
    assert circles(lambda module: module) == []


def test_no_room_needs_one_that_needs_it() -> None:
    assert circles(room) == []


def test_no_public_function_shares_its_name_with_a_module() -> None:
    modules = {name.rpartition(".")[2] for name in MODULES if name != "evit_ext" and ".ops." not in name}
    packages = {name for name in evit_ext.__all__ if name in ("models", "ops", "tokens")}
    assert modules & set(evit_ext.__all__) == packages


def test_folders_and_files_are_of_a_size_to_read() -> None:
    long = {
        name: lines for name, file in MODULES.items() if (lines := len(file.read_text().splitlines())) > 400
    }
    assert long == {}
    for folder in {file.parent for file in MODULES.values()}:
        assert len(list(folder.glob("*.py"))) <= 30, folder
