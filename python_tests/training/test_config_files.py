"""Recipes that somebody else has written: one error of a few lines, whatever is in them."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from evit_ext.training import load_config

#: Ten times in a list, and that again: 10^9 values in 300 bytes.
BOMB = "".join(
    f"  {name}: &{name} [{', '.join([f'*{before}' if before else 'x'] * 10)}]\n"
    for before, name in zip(["", *"abcdefgh"], "abcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        (f"model_args:\n{BOMB}", ValueError, "has more than 10000 values, with those that its aliases"),
        (f"x:\n{BOMB}lr: *i", ValueError, "has more than 10000 values"),
        ("model_args: &a\n  b: *a", ValueError, "has more than 10000 values"),
        ("x: " + "[" * 100_000, ValueError, "is not YAML: RecursionError"),
        ("lr: 1" + "0" * 400, TypeError, "lr must be a number, got 1000.*0"),
        ("epochs: 1" + "0" * 5000, ValueError, "is not YAML: Exceeds the limit"),
        (
            "epochs: 0x" + "f" * 10_000,
            TypeError,
            "epochs must be a whole number, got a value of type int that",
        ),
        (
            "epochs: 100000000000000000000",
            TypeError,
            "epochs must be a whole number, got 10000000000000000000",
        ),
        ("epochs: -1", ValueError, "recipe.yaml: epochs must be at least 1, got -1"),
        ("lr: " + "x" * 100_000, TypeError, "lr must be a number, got 'xxx"),
        ("model: " + "x" * 100_000, TypeError, "model must be text of at most 4096 characters, got 'xxx"),
        ("? " + "x" * 100_000 + "\n: 1", ValueError, "there is no field 'xxx"),
        ("? [a, b]\n: 1", ValueError, "is not YAML: line 1: found unhashable key"),
        ("lr: 2024-13-45", ValueError, "is not YAML: month must be in 1..12"),
        ('lr: !!int ""', ValueError, "is not YAML: IndexError"),
        ("lr: !!timestamp noon", ValueError, "is not YAML: AttributeError"),
        ("lr: !!python/name:os.system", ValueError, "is not YAML: line 1: could not determine a constructor"),
        ("# " + "x" * 2**20, ValueError, "recipe.yaml has 1048578 bytes, a recipe at most 1048576"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_one_error_of_a_few_lines(tmp_path: Path, text: str, error: type[Exception], message: str) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    start = time.perf_counter()
    with pytest.raises(error, match=message) as caught:
        load_config(file)
    assert str(file) in str(caught.value) and len(str(caught.value)) < 500
    assert time.perf_counter() - start < 10


def test_an_alias_of_a_number_is_fine(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("lr: &lr 1e-3\nmin_lr: *lr\n")
    config = load_config(tmp_path / "recipe.yaml")
    assert config.lr == config.min_lr == 1e-3
