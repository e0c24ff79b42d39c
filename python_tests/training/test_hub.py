"""Whether pretrained weights can be had, within seconds and without a network."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest

from evit_ext.training import hub


def test_no_answer_takes_no_longer_than_the_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = threading.Event()

    def never(address: str, patience: float, answers: list[str]) -> None:
        asked.wait(20)

    monkeypatch.setattr(hub, "_ask", never)
    began = time.monotonic()
    assert hub.missing_weights("deit_tiny", {}, 0.2) == "no answer within 0.2 s"
    assert time.monotonic() - began < 5
    asked.set()


def test_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(request: Any, timeout: float) -> None:
        raise OSError("no route")

    monkeypatch.setattr(hub.urllib.request, "urlopen", refused)
    assert hub.missing_weights("deit_tiny", {}) == "OSError: no route"
    assert hub.missing_weights("vit_tiny_patch16_224", {"depth": 3}) == "OSError: no route"


def test_weights_in_the_cache_need_no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: str(tmp_path / "weights"))
    assert hub.missing_weights("deit_tiny", {}) == ""
