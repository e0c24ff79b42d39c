"""load_checkpoint: URLs, the hub, and no network."""

from __future__ import annotations

import hashlib
import http.server
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import (
    assert_loaded,
    deit_file,
    draw,
    evit,
    refused,
    saved,
    truncated_safetensors,
)
from safetensors.torch import save_file

from evit_ext import models
from evit_ext.weights import load_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    return tmp_path / "hub" / "checkpoints"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Any]:
    """A web server: a function from a path below its folder to a URL, with that folder and the requests."""
    folder = tmp_path / "served"
    folder.mkdir()
    requests: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args, directory=str(folder))

        def log_message(self, format: str, *args: Any) -> None:
            requests.append(self.path)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()

        def url(name: str) -> str:
            return f"http://127.0.0.1:{running.server_port}/{name}"

        url.folder, url.requests = folder, requests  # type: ignore[attr-defined]
        yield url
        running.shutdown()
        thread.join()


def test_url(server: Any, cache: Path) -> None:
    state = deit_file()
    saved(server.folder, {"model": state})
    for _ in range(2):
        loaded = load_checkpoint(model := evit(), server("checkpoint.pth"), progress=False)
        assert_loaded(model, state)
        assert loaded.source == server("checkpoint.pth")
    assert server.requests == ["/checkpoint.pth"]  # the second time, from the cache


def test_two_urls_with_the_same_name(server: Any, cache: Path) -> None:
    for folder, seed in (("a", 1), ("b", 2)):
        (server.folder / folder).mkdir()
        saved(server.folder / folder, {"head.bias": draw({"x": (5,)}, seed)["x"]})
    model = evit()
    biases = []
    for folder in ("a", "b"):
        load_checkpoint(model, server(f"{folder}/checkpoint.pth"), strict=False, progress=False)
        biases.append(model.head.bias.detach().clone())
    assert not torch.equal(*biases)


def test_hash_in_the_name(server: Any, cache: Path) -> None:
    file = saved(server.folder, deit_file())
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    right, wrong = f"deit-{digest[:8]}.pth", "deit-0123456a.pth"
    shutil.copy(file, server.folder / right)
    shutil.copy(file, server.folder / wrong)
    load_checkpoint(evit(), server(right), progress=False)
    assert (cache / right).exists()  # where torch and timm would look for it
    said = refused(evit(), server(wrong))
    assert "its SHA-256 does not begin with 0123456a" in said
    # "-83.3" is no hash, nor is a date.
    for name in ("lvvit_s-26M-224-83.3.pth.tar", "deit-20210101.pth"):
        shutil.copy(file, server.folder / name)
        load_checkpoint(evit(), server(name), progress=False)
    assert not list(cache.rglob("*.unfinished"))
    assert not list(cache.rglob(wrong))


def test_urls_that_give_no_checkpoint(server: Any, cache: Path) -> None:
    (server.folder / "view.pth").write_bytes(b"<html>Sign in</html>")
    assert f"{server('view.pth')} is a web page" in refused(evit(), server("view.pth"))
    truncated_safetensors(server.folder / "short.safetensors")
    assert "is not complete, or damaged" in refused(evit(), server("short.safetensors"))
    said = refused(evit(), server("none.pth"), RuntimeError)
    assert said == f"{server('none.pth')} could not be fetched: the server answered 404 File not found"
    assert not [path for path in cache.rglob("*") if path.is_file()]
    # Not stuck: once the right file is there, it is fetched.
    shutil.copy(saved(server.folder, deit_file()), server.folder / "view.pth")
    load_checkpoint(evit(), server("view.pth"), progress=False)


def test_offline(cache: Path) -> None:
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as closed:
        url = f"http://127.0.0.1:{closed.server_port}/checkpoint.pth"
    said = refused(evit(), url, RuntimeError)
    assert f"{url} could not be fetched, nor is it in torch's cache (URLError: " in said
    assert said.endswith("Without a network, bring the file here another way and give its path")


def test_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The safetensors file is preferred; what is in the cache is found when the hub is not reached."""
    errors = pytest.importorskip("huggingface_hub.errors")
    state = deit_file()
    file = saved(tmp_path, state)
    save_file(state, tmp_path / "model.safetensors")
    asked: list[Any] = []
    there: dict[str, Any] = {}

    def download(repository: str, name: str, revision: Any = None, local_files_only: bool = False) -> str:
        asked.append((repository, name, revision, local_files_only))
        found = there.get(name, errors.EntryNotFoundError("404"))
        if isinstance(found, Exception):
            raise found
        return str(found)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    there["pytorch_model.bin"] = file
    load_checkpoint(model := evit(), "hf-hub:someone/evit@v2")
    assert_loaded(model, state)
    assert asked == [
        ("someone/evit", "model.safetensors", "v2", False),
        ("someone/evit", "pytorch_model.bin", "v2", False),
    ]
    there["model.safetensors"] = errors.LocalEntryNotFoundError("offline")
    load_checkpoint(evit(), "hf_hub:someone/evit")
    assert asked[-1] == ("someone/evit", "pytorch_model.bin", None, True)
    there["pytorch_model.bin"] = errors.LocalEntryNotFoundError("offline")
    said = refused(evit(), "hf-hub:someone/evit", RuntimeError)
    assert "could not be fetched from the Hugging Face hub, nor is it in its cache" in said
    there.clear()
    said = refused(evit(), "hf-hub:someone/evit", RuntimeError)
    assert "has no model.safetensors and no pytorch_model.bin" in said
    assert "hf-hub:owner/name@revision, got 'hf-hub:evit'" in refused(evit(), "hf-hub:evit")


@pytest.mark.parametrize("name", ["deit_tiny", "dynamicvit_tiny", "lvvit_small"])
def test_pretrained_offline_names_the_way_out(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise ConnectionError("refused")

    for module in ("deit", "lvvit"):
        monkeypatch.setattr(f"evit_ext.models.{module}.build_model_with_cfg", fail)
    with pytest.raises(RuntimeError, match="pretrained=False and load a file with evit_ext.load_ch"):
        getattr(models, name)(pretrained=True)
