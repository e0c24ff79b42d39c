"""Shards: samples within limits, whatever a compressed file of a few kilobytes expands to."""

from __future__ import annotations

import gzip
import io
import resource
import tarfile
from pathlib import Path

import pytest
from image_data import encoded

from evit_ext.data.images import Unreadable
from evit_ext.data.shards import Encoded, read_tar

ZEROS = 300 * 2**20


class Zeros(io.RawIOBase):
    """So many zeros to read, which take no memory."""

    def __init__(self, size: int) -> None:
        self.left = size

    def read(self, size: int = -1) -> bytes:
        size = min(size if size >= 0 else self.left, self.left)
        self.left -= size
        return bytes(size)


def add(tar: tarfile.TarFile, name: str, data: bytes | None, size: int = ZEROS, kind: bytes = b"0") -> None:
    member = tarfile.TarInfo(name)
    member.size, member.type = (size if data is None else len(data)), kind
    tar.addfile(member, Zeros(size) if data is None else io.BytesIO(data))  # type: ignore[arg-type]


def write(path: Path, huge: str, kind: bytes = b"0") -> int:
    with gzip.open(path, "wb", 1) as file, tarfile.open(fileobj=file, mode="w") as tar:
        add(tar, "a.jpg", encoded(0, 1))
        add(tar, "a.cls", b"0")
        add(tar, huge, None, kind=kind)
        add(tar, "c.jpg", encoded(1, 1))
        add(tar, "c.cls", b"1")
    return path.stat().st_size


@pytest.mark.parametrize("huge", ["b.jpg", "b.cls", "a.json"])
def test_huge_files_are_not_read_into_memory(tmp_path: Path, huge: str) -> None:
    path = tmp_path / "shard.tar.gz"
    assert write(path, huge) < 2**21
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = list(read_tar(path, 2**20))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024
    assert [sample.label for sample in found if isinstance(sample, Encoded)][-1] == 1
    (report,) = (sample for sample in found if isinstance(sample, Unreadable))
    assert "a file of 314,572,800 bytes" in report.reason


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
def test_huge_headers(tmp_path: Path, kind: bytes) -> None:
    """tarfile reads a name or header into memory, however long it says it is."""
    path = tmp_path / "shard.tar.gz"
    write(path, "b.jpg", kind)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = list(read_tar(path))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024
    assert isinstance(found[-1], Unreadable) and "a header of 314,572,800 bytes" in found[-1].reason


def test_a_damaged_compression(tmp_path: Path) -> None:
    path = tmp_path / "shard.tar.gz"
    write(path, "b.jpg")
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2 : len(whole) // 2 + 50] = bytes(50)
    path.write_bytes(bytes(whole))
    assert isinstance(list(read_tar(path, 2**20))[-1], Unreadable)
