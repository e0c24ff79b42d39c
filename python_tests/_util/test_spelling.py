"""Suggestions by meaning, then by letters."""

from __future__ import annotations

import pytest

from evit_ext._util.choices import ENGINES
from evit_ext._util.spelling import _MEANINGS, nearest
from evit_ext.cli import parser

OPTIONS = ["--lr", "--keep-rate", "--batch-size", "--output", "--workers"]


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("--learning-rate", "--lr"), ("--learning_rate", "--lr"), ("--batch", "--batch-size"),
        ("--out-dir", "--output"), ("-j", "--workers"), ("--keeprate", "--keep-rate"), ("--zzz", None),
    ],
)  # fmt: skip
def test_nearest(given: str, meant: str | None) -> None:
    assert nearest(given, OPTIONS) == meant
    assert nearest("learning_rate", ["lr", "learning"]) == "lr"


def test_every_meaning_is_an_option_of_a_command_or_an_engine() -> None:
    commands = next(action.choices for action in parser()._actions if isinstance(action.choices, dict))
    actions = [action for command in commands.values() for action in command._actions]
    known = {option.lstrip("-").replace("-", "_") for action in actions for option in action.option_strings}
    assert set(_MEANINGS.values()) <= known | {engine.replace("-", "_") for engine in ENGINES}
