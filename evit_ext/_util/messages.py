"""Values in messages: at most a line of them, whoever made them."""

from __future__ import annotations

import reprlib
from typing import Any

#: The longest text that a message repeats.
_LONGEST = 120

_SHORT = reprlib.Repr()
_SHORT.maxlevel = 3
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = _LONGEST


def shown(value: Any) -> str:
    """Return the ``repr`` of a value in a line; lists in lists, long texts and huge numbers are cut short.

    A file may hold a value whose ``repr`` takes gigabytes: a list ten times in a list, and that again.
    """
    try:
        return shortened(_SHORT.repr(value[: 2 * _LONGEST] if isinstance(value, bytes) else value))
    except Exception:  # a whole number of too many digits, or a __repr__ that fails
        return f"a value of type {type(value).__name__} that cannot be shown"


def shortened(text: object) -> str:
    """Return a text, such as another library's message, in a line of printable characters."""
    line = " ".join(str(text)[: 10 * _LONGEST].split())
    line = "".join(character if character.isprintable() else "\ufffd" for character in line)
    half = _LONGEST // 2
    return line if len(line) <= _LONGEST else f"{line[: half - 2]} … {line[1 - half :]}"


def reason(error: BaseException) -> str:
    """Return what an error says in a line, after its kind where it says little without."""
    said = shortened(error)
    is_clear = said and not isinstance(error, (ArithmeticError, AttributeError, LookupError, RecursionError))
    return said if is_clear else f"{type(error).__name__} {said}".strip()
