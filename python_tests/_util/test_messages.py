"""Values in messages take a line, whatever they are."""

from __future__ import annotations

from typing import Any

import pytest

from evit_ext._util.messages import shortened, shown


def bomb(levels: int) -> Any:
    value: Any = "x" * 9
    for _ in range(levels):
        value = [value] * 9
    return value


class Unspeakable:
    def __repr__(self) -> str:
        raise RuntimeError


@pytest.mark.parametrize(
    "value",
    [
        bomb(30),
        {"a": bomb(30)},
        "x" * 10**7,
        b"x" * 10**7,
        list(range(10**6)),
        16**100_000,  # more digits than Python writes
        Unspeakable(),
        "a\nb\x1b[31m",
        [[]] * 3,
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_line(value: Any) -> None:
    text = shown(value)
    assert 0 < len(text) <= 120 and text.isprintable()


def test_short_values_are_as_they_are() -> None:
    for value in ("a name", 0.7, None, [3, 6, 9], {"a": (1, 2)}, "x" * 100):
        assert shown(value) == repr(value)


def test_texts_of_others() -> None:
    assert shortened(ValueError("two\n  lines \x1b[0m")) == "two lines \ufffd[0m"
    long = shortened("begin " + "x" * 10**6 + " end")
    assert len(long) <= 120 and long.startswith("begin x")
