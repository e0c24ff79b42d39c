"""load_checkpoint: files that lie, are damaged, or are none."""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import pickle
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_files import (
    deit_file,
    evit,
    refused,
    saved,
    training_file,
    truncated_safetensors,
    vit,
)
from torch import nn

from evit_ext.weights import load_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")


class Harmful:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


class Calls:
    """Calls a function when it is unpickled."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("zip_format", [True, False])
@pytest.mark.parametrize("place", ["args", "model", "numpy"])
def test_nothing_in_a_file_is_executed(tmp_path: Path, zip_format: bool, place: str) -> None:
    marker = tmp_path / "executed"
    harmful = Harmful(f"touch {marker}")
    content: dict[str, Any] = {"model": deit_file()}
    if place == "args":
        content["args"] = argparse.Namespace(model=harmful)
    elif place == "model":
        content["model"]["head.bias"] = harmful
    else:
        content["epoch"] = Calls(functools.partial, os.system, f"touch {marker}")
    file = saved(tmp_path, content, _use_new_zipfile_serialization=zip_format)
    said = refused(evit(), file)
    assert not marker.exists()
    assert "nothing was executed" in said and "torch.load(path, weights_only=False)" in said
    name = "functools.partial" if place == "numpy" else f"{os.system.__module__}.system"
    assert f"holds more than weights: {name}" in said
    # The file would have done it.
    torch.load(file, weights_only=False)
    assert marker.exists() == (place != "numpy")


def test_numpys_own_code_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NumPy's unpickling takes sizes and addresses from the file: it is skipped, not trusted."""
    file = saved(tmp_path, training_file())
    calls = []
    multiarray = np.ones(1).__reduce__()[0].__module__
    monkeypatch.setattr(f"{multiarray}._reconstruct", lambda *a: calls.append(a))
    monkeypatch.setattr(f"{multiarray}.scalar", lambda *a: calls.append(a))
    load_checkpoint(evit(), file)
    assert not calls


def test_a_whole_model_is_refused(tmp_path: Path) -> None:
    said = refused(evit(), saved(tmp_path, vit()))
    assert "timm.models.vision_transformer.VisionTransformer" in said


def test_what_is_allowed_is_allowed_here_only(tmp_path: Path) -> None:
    file = saved(tmp_path, training_file())
    load_checkpoint(evit(), file)
    assert argparse.Namespace not in torch.serialization.get_safe_globals()
    with pytest.raises(pickle.UnpicklingError):
        torch.load(file, weights_only=True)
    # What somebody has allowed stays allowed.
    with torch.serialization.safe_globals([argparse.Namespace]):
        load_checkpoint(evit(), file)
        assert argparse.Namespace in torch.serialization.get_safe_globals()


def npz(path: Path) -> None:
    np.savez(path.open("wb"), a=np.ones(3))


def zip_of_text(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")


def torchscript(path: Path) -> None:
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), path)


def truncated(path: Path) -> None:
    torch.save(deit_file(), path)
    path.write_bytes(path.read_bytes()[:-5000])


def truncated_legacy(path: Path) -> None:
    torch.save(deit_file(), path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:-5000])


BAD_FILES: dict[str, tuple[Any, str]] = {
    "empty": (b"", "is empty"),
    "html": (b"\n<!DOCTYPE html><html>Sign in</html>", "is a web page, not a checkpoint"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a", "is a Git LFS pointer"),
    "text": (b"hello, world", "is no checkpoint, it begins with b'hello, world'"),
    "json": (b'{"model_type": "vit"}', "is a JSON file"),
    "gzip": (b"\x1f\x8b\x08\x00", "is compressed by gzip"),
    "npy": (b"\x93NUMPY\x01\x00", "is a NumPy array"),
    "npz": (npz, "is a NumPy archive, as JAX's vision transformers are published in: timm"),
    "zip": (zip_of_text, "is a zip archive that torch.save did not write"),
    "torchscript": (torchscript, "is a TorchScript archive"),
    "pickle": (pickle.dumps({"a": 1}), "is damaged, or no checkpoint"),
    "truncated": (truncated, "is not complete, or damaged: it has"),
    "truncated legacy": (truncated_legacy, "is damaged, or no checkpoint"),
    "truncated safetensors": (truncated_safetensors, "is not complete, or damaged"),
    "safetensors header": ((40).to_bytes(8, "little") + b"{not json", "is not complete, or damaged"),
}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:Detected pickle protocol")
@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_files(tmp_path: Path, kind: str) -> None:
    content, message = BAD_FILES[kind]
    file = tmp_path / "checkpoint.pth"
    if callable(content):
        content(file)
    else:
        file.write_bytes(content)
    assert refused(evit(), file).startswith(f"{file} {message}")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_every_truncation_and_flipped_byte_gives_a_clear_error(tmp_path: Path) -> None:
    """Whatever is damaged, it is a ValueError or goes unnoticed; nothing else comes out."""
    rng = np.random.default_rng(0)
    model = nn.Linear(3, 2)
    for new_format in (True, False):
        whole = saved(tmp_path, {"model": model.state_dict()}, _use_new_zipfile_serialization=new_format)
        content = whole.read_bytes()
        damaged = tmp_path / "damaged.pth"
        for _ in range(150):
            data = bytearray(content[: rng.integers(1, len(content) + 1)])
            data[rng.integers(len(data))] ^= 1 << rng.integers(8)
            damaged.write_bytes(data)
            try:
                load_checkpoint(model, damaged)
            except ValueError:
                continue


def test_missing_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert f"there is no file no-such.pth in {tmp_path}" in refused(
        evit(), "no-such.pth", error=FileNotFoundError
    )
    (tmp_path / "model.safetensors").touch()
    said = refused(evit(), tmp_path, error=IsADirectoryError)
    assert said == f"{tmp_path} is a folder: give the file in it; in it: model.safetensors"


@pytest.mark.parametrize("source", ["ftp://example.org/a.pth", "s3://bucket/a.pth", "file:///a.pth"])
def test_other_schemes(source: str) -> None:
    assert f"must be a path, an http(s) URL or hf-hub:owner/name, got {source!r}" in refused(evit(), source)


def test_arguments_of_other_types(tmp_path: Path) -> None:
    file = saved(tmp_path, deit_file())
    for options, message in (
        ({"strict": 1}, "strict must be True or False, got 1"),
        ({"resize_head": None}, "resize_head must be True or False, got None"),
        ({"use_ema": "yes"}, "use_ema must be True, False or None, got 'yes'"),
        ({"resize_pos_embed": 7}, "or the grid that the weights are for, (height, width), got 7"),
        ({"resize_pos_embed": (7, 7, 1)}, "(height, width), got (7, 7, 1)"),
        ({"resize_pos_embed": (7, 7.0)}, "(height, width), got (7, 7.0)"),
    ):
        assert message in refused(evit(), file, TypeError, **options)
    assert "(height, width), got (0, 16)" in refused(evit(), file, resize_pos_embed=(0, 16))
    assert "path_or_url must be a path or a URL, got int" in refused(evit(), 3, TypeError)
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got dict"):
        load_checkpoint({}, file)  # type: ignore[arg-type]


def test_dicts_in_themselves_and_in_many_places(tmp_path: Path) -> None:
    """A small file must not keep anyone busy for long."""
    itself: dict[str, Any] = {"epoch": 3}
    itself["model"] = itself
    refused(evit(), saved(tmp_path, itself))
    itself["weight"] = torch.zeros(1)
    assert "more than 8 deep" in refused(evit(), saved(tmp_path, itself))
    wide: dict[str, Any] = {"nothing": 1}
    for _ in range(60):
        wide = {"model": wide, "state_dict": wide}
    assert "found no weights" in refused(evit(), saved(tmp_path, wide))


def test_many_threads(tmp_path: Path) -> None:
    file = saved(tmp_path, training_file())
    before = torch.serialization.get_safe_globals()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: load_checkpoint(evit(), file), range(24)))
    assert torch.serialization.get_safe_globals() == before


def test_compressed_archives(tmp_path: Path) -> None:
    """A megabyte of them may hold gigabytes; torch.save writes none."""
    file = saved(tmp_path, deit_file())
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(tmp_path / "b.pth", "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    assert "b.pth is compressed (in it " in refused(evit(), tmp_path / "b.pth")


@pytest.mark.parametrize("place", range(1, 60, 3))
def test_damaged_lists_of_contents(tmp_path: Path, place: int) -> None:
    """Each bit of the list's first entry: zipfile has many errors, of which none names the file."""
    file = saved(tmp_path, deit_file())
    data = bytearray(file.read_bytes())
    data[data.index(b"PK\x01\x02") + place] ^= 0xC0
    file.write_bytes(data)
    with contextlib.suppress(ValueError):
        load_checkpoint(evit(), file)
