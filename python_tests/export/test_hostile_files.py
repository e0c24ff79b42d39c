"""Exported files that somebody else has made, and places that somebody else has prepared."""

from __future__ import annotations

import json
import resource
import zipfile
from pathlib import Path
from typing import Any

import pytest

import evit_ext
from evit_ext.export import Metadata, export_model, read_metadata

GOOD = Metadata("m", (0.5,), (3, 8, 8), (0.5,) * 3, (1.0,) * 3, "bilinear", 0.9).to_json()
PT2, AOTI = "a/extra/evit.json", "a/data/aotinductor/model/b.wrapper_metadata.json"


def archive(folder: Path, name: str, text: str | bytes) -> Path:
    with zipfile.ZipFile(folder / "a.pt2", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr(name, text)
    return folder / "a.pt2"


def test_nothing_is_written_through_a_planted_link(
    small_vit: Any, one_thread: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither in the place of the file nor where its name might be expected while it is written."""
    vit = evit_ext.apply(small_vit(depth=1), 0.5, (0,))
    victim = tmp_path / "victim"
    victim.write_text("mine")
    planted = [tmp_path / name for name in ("a.pt2", "a.unfinished.pt2", "a.pt2.unfinished")]
    for link in planted:
        link.symlink_to(victim)
    export_model(vit, tmp_path / "a.pt2")
    assert victim.read_text() == "mine"
    assert not planted[0].is_symlink() and read_metadata(planted[0]).keep_rate == (0.5,)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [*(link.name for link in planted), "victim"]
    )


def test_a_place_that_is_none(small_vit: Any, tmp_path: Path) -> None:
    """Before anything is computed."""
    with pytest.raises(FileNotFoundError, match="there is no folder .*nowhere to write a.pt2 to"):
        export_model(small_vit(depth=1), tmp_path / "nowhere" / "a.pt2")
    with pytest.raises(IsADirectoryError, match="is a folder, expected a file"):
        export_model(small_vit(depth=1), tmp_path)


@pytest.mark.parametrize("name", [PT2, AOTI])
def test_decompressed_no_further_than_needed(tmp_path: Path, name: str) -> None:
    """A megabyte of zeros, compressed, is a gigabyte."""
    file = archive(tmp_path, name, bytes(2**30))
    assert file.stat().st_size < 2**21
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match="a.pt2 is damaged: a/.* in it has more than 16777216 bytes"):
        read_metadata(file)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KiB


def test_a_size_that_is_not_true(tmp_path: Path) -> None:
    """The archive's list of contents says less than there is."""
    file = archive(tmp_path, PT2, bytes(2**25))
    data = file.read_bytes()
    file.write_bytes(data.replace((2**25).to_bytes(4, "little"), (100).to_bytes(4, "little")))
    with pytest.raises(ValueError, match="a.pt2 is damaged"):
        read_metadata(file)


def test_an_aotinductor_package_is_read_without_its_code(tmp_path: Path) -> None:
    file = archive(tmp_path, AOTI, json.dumps({"AOTI_DEVICE_KEY": "cpu", "evit": GOOD}))
    assert read_metadata(file) == Metadata.from_json(GOOD)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        "[" * 100_000,
        b"\xff",
        GOOD.replace("0.9", '"much"'),
        GOOD.replace("0.9", "1" + "0" * 400),
        GOOD.replace("[3, 8, 8]", '["3", 8, 8]'),
        GOOD.replace('"m"', "null"),
        json.dumps({"evit": 3}),
        json.dumps({"model": "x" * 10**6}),
    ],
    ids=lambda text: str(text[:20]),
)
def test_damaged_metadata(tmp_path: Path, text: str | bytes) -> None:
    for name in (PT2, AOTI):
        with pytest.raises(ValueError, match="a.pt2 (is damaged|was not written by evit export)") as caught:
            read_metadata(archive(tmp_path, name, text))
        assert len(str(caught.value)) < 500


def test_a_damaged_archive(tmp_path: Path) -> None:
    data = bytearray(archive(tmp_path, PT2, GOOD).read_bytes())
    for place in range(30, len(data) - 22, 7):
        (tmp_path / "b.pt2").write_bytes(data[:place] + bytes([data[place] ^ 255]) + data[place + 1 :])
        try:
            read_metadata(tmp_path / "b.pt2")
        except ValueError as error:
            assert "b.pt2" in str(error)
