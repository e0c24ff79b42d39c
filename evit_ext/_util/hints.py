"""Values of a file, as type hints want them."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from typing import Any

#: Characters of a text, which messages repeat; the longest path of a file on Linux.
_LONGEST = 4096


def as_hinted(value: Any, hint: Any) -> Any:
    """Return `value` as `hint` wants it: an int where a float is meant, a list for a tuple.

    Args:
        hint: int, float, bool, str; tuples of these; dicts, whatever is in them; any of them or None.

    Raises:
        TypeError, ValueError: it is something else, or a text of more than 4096 characters.
        OverflowError: a whole number of more than 64 bits, or too large for a float.
    """
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        if value is None:
            return None
        (hint,) = (kind for kind in inner if kind is not type(None))
        return as_hinted(value, hint)
    if origin is tuple and isinstance(value, (list, tuple)):
        if inner[-1] is not Ellipsis and len(value) != len(inner):
            raise TypeError
        return tuple(as_hinted(item, inner[0]) for item in value)
    if origin is dict and isinstance(value, Mapping):
        return dict(value)
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if hint is float and isinstance(value, str):
        return float(value)  # YAML reads 1e-3 as a string
    if hint is int and isinstance(value, int) and not isinstance(value, bool):
        if value.bit_length() > 63:
            raise OverflowError
        return value
    if isinstance(value, str) and len(value) > _LONGEST:
        raise ValueError
    if isinstance(hint, type) and isinstance(value, hint) and hint is not int:
        return value
    raise TypeError
