"""Unreadable images are announced as they are found, and counted."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from evit_ext.training.ranks import ALONE
from evit_ext.training.run.unreadable import TooManyUnreadable, UnreadableImages


def test_they_are_announced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = UnreadableImages(tmp_path, ALONE, limit=200)
    images.begin()
    for first in (0, 2, 105):
        images.add((f"{number}.jpg", "truncated") for number in range(first, {0: 2, 2: 105, 105: 110}[first]))
        images.share()
    assert capsys.readouterr().out.splitlines() == [
        "0.jpg cannot be read: truncated",
        "1.jpg cannot be read: truncated",
        "2.jpg cannot be read: truncated",
        f"10 images cannot be read; all are in {tmp_path}/unreadable.csv",
        f"100 images cannot be read; all are in {tmp_path}/unreadable.csv",
    ]
    with (tmp_path / "unreadable.csv").open(newline="", encoding="utf-8") as file:
        assert len(list(csv.DictReader(file))) == len(images) == 110
    images.add((f"more {number}.jpg", "truncated") for number in range(100))
    with pytest.raises(TooManyUnreadable, match="210 images cannot be read, more than max_unreadable 200"):
        images.share()
