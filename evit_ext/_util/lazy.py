"""Packages whose public names are imported when first asked for, as that takes seconds (torch, timm)."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def lazily(package: str, public: str) -> Callable[[str], Any]:
    """Return the ``__getattr__`` of a package whose names a module of it has.

    Args:
        package: its name.
        public: name of the module that imports them, whose ``__all__`` is the package's.
    """

    def find(name: str) -> Any:
        # Python asks for __path__ and the like: of names that begin with an underscore, one is public.
        if name == "__all__" or not name.startswith("_"):
            module = importlib.import_module(public)
            if name == "__all__" or name in module.__all__:
                return getattr(module, name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return find


def is_command() -> bool:
    """Return whether this process is the command ``evit``, which checks what it is asked before it imports
    torch. (Python sets the program's name to -m while it looks for the module of ``python -m evit_ext``.)"""
    name = Path(sys.argv[0]).name if sys.argv else ""
    if name == "-m":
        module = sys.orig_argv[sys.orig_argv.index("-m") + 1] if "-m" in sys.orig_argv[:-1] else ""
        return module.partition(".")[0] == "evit_ext"
    return name == "evit"
