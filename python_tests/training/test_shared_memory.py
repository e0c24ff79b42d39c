"""The space in /dev/shm is looked at before a worker starts."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from open_loaders import loaders

from evit_ext.training import shared_memory


def test_too_little_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=64 * 2**20))
    opened = loaders(folder, workers=4, micro_batch=14)
    opened.check_shared_memory()  # 9 batches of 14 images of 32 pixels
    assert opened.image is not None
    opened.image = {**opened.image, "input_size": (3, 512, 512)}
    with pytest.raises(
        ValueError, match="has 64 MiB free, and 4 workers hand over up to 378 MiB .*--workers 0"
    ):
        opened.check_shared_memory()
    monkeypatch.setattr(shared_memory, "_SHARED_MEMORY", Path("/nowhere"))
    opened.check_shared_memory()  # a system that has none


def test_no_workers_need_none(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    loaders(folder, workers=0).check_shared_memory()
