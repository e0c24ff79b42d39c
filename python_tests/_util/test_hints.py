"""Values of a file become what a field's type says, or are refused."""

from __future__ import annotations

from typing import Any

import pytest

from evit_ext._util.hints import as_hinted


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
        (1, float, 1.0),
        ("1e-3", float, 1e-3),
        ([1, 2], tuple[float, ...], (1.0, 2.0)),
        ([1, 2], tuple[int, int], (1, 2)),
        (None, int | None, None),
        (2**63 - 1, int | None, 2**63 - 1),
        ("x" * 4096, str, "x" * 4096),
        ({"a": [1]}, dict[str, Any], {"a": [1]}),
    ],
    ids=str,
)
def test_taken(value: Any, hint: Any, expected: Any) -> None:
    found = as_hinted(value, hint)
    assert found == expected and type(found) is type(expected)


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        (True, int),
        (True, float),
        (1.5, int),
        (2**63, int),
        (10**400, float),
        ("much", float),
        ([1, 2, 3], tuple[int, int]),
        (["1"], tuple[int, ...]),
        ("x" * 4097, str | None),
        (None, str),
        ([], dict[str, Any]),
    ],
    ids=lambda value: str(value)[:20],
)
def test_refused(value: Any, hint: Any) -> None:
    with pytest.raises((TypeError, ValueError, OverflowError)):
        as_hinted(value, hint)
