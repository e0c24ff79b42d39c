"""Which models there are, from the sources of timm and of this package: to import them takes seconds."""

from __future__ import annotations

import importlib.util
import re
from functools import cache
from pathlib import Path

from evit_ext._util.spelling import unknown_model

# Of this package, the functions that evit_ext.models has are made by another decorator.
_DEFINED = re.compile(r"^@(register_model|named_model\(.*\))\ndef (\w+)\(", re.MULTILINE)


def problem_with_model(name: str) -> str:
    """Return what is wrong with the name of a model; "" if the sources have it, which is no promise."""
    # Old names are strings in them, and so are names with the tags of weights.
    plain = re.escape(name.partition(".")[0])
    mention = re.compile(rf"""^def {plain}\(|['"]{plain}['".]""", re.MULTILINE)
    ours: list[str] = []
    others: list[str] = []
    for package, text in _sources():
        if mention.search(text):
            return ""
        for decorator, known in _DEFINED.findall(text):
            is_ours = package == "evit_ext" and decorator != "register_model"
            (ours if is_ours else others).append(known)
    return str(unknown_model(name, sorted(ours), others))


@cache
def _sources() -> tuple[tuple[str, str], ...]:
    """Return the package and the text of each module that defines models."""
    found = []
    for package in ("evit_ext", "timm"):
        spec = importlib.util.find_spec(package)
        for folder in (spec and spec.submodule_search_locations) or ():
            for file in sorted(Path(folder, "models").glob("*.py")):
                found.append((package, file.read_text("utf-8")))
    return tuple(found)
