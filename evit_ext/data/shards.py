"""WebDataset's shards: tar files, perhaps compressed, read from front to back within limits."""

from __future__ import annotations

import lzma
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from evit_ext._util.messages import shown
from evit_ext.data.images import Unreadable, printable

#: A sample's files may have so many bytes; the largest images that are read have a few for each pixel.
MAX_SAMPLE_BYTES = 2**29
# A name or pax header of a tar file is of a few hundred bytes.
_MAX_HEADER = 2**20


class Encoded(NamedTuple):
    """An image as stored, its label and its path."""

    data: bytes
    label: int
    path: str


class _Header(tarfile.TarInfo):
    """A member of a tar file whose headers are read only if they are small.

    A compressed shard of a few MB can have a header (a long name, or a pax header) of gigabytes, which
    tarfile reads into memory.
    """

    def _proc_member(self, tar: tarfile.TarFile) -> tarfile.TarInfo:
        if self.type not in (*tarfile.REGULAR_TYPES, tarfile.DIRTYPE) and self.size > _MAX_HEADER:
            raise tarfile.ReadError(f"a header of {self.size:,} bytes, more than {_MAX_HEADER:,}")
        return super()._proc_member(tar)  # type: ignore[misc]


def read_tar(shard: Path, max_bytes: int = MAX_SAMPLE_BYTES) -> Iterator[Encoded | Unreadable]:
    """Read the samples of a shard; if it is damaged, report that and stop at the damage.

    Args:
        shard: a tar file, perhaps compressed.
        max_bytes: a sample whose files have more bytes counts as unreadable, and is not read into memory.
    """
    sample: dict[str, bytes] = {}
    too_large = 0
    key = None
    try:
        with tarfile.open(shard, "r|*", tarinfo=_Header) as tar:
            for member in tar:
                file = tar.extractfile(member) if member.isfile() else None
                tar.members = []  # type: ignore[attr-defined]  # which tarfile would keep, all of them
                if file is None:
                    continue
                path = PurePosixPath(member.name)
                stem, _, ending = path.name.partition(".")
                # As in WebDataset, a sample's name ends at the first dot.
                if (path.parent, stem) != key:
                    yield from _sample(shard, key, sample, too_large)
                    key, sample, too_large = (path.parent, stem), {}, 0
                if sum(map(len, sample.values())) + member.size > max_bytes:
                    too_large = max(too_large, member.size)
                else:
                    sample[ending.lower()] = file.read()
            end = tar.offset
        yield from _sample(shard, key, sample, too_large)
        # tarfile does not notice when a file is cut off between two members.
        if shard.suffix == ".tar" and not _has_end_mark(shard, end):
            reason = "ReadError: the file breaks off, without the end mark of a tar file"
            yield Unreadable(printable(shard), reason)
    except (OSError, EOFError, tarfile.TarError, zlib.error, lzma.LZMAError) as error:
        yield Unreadable(printable(shard), f"{type(error).__name__}: {error}")


def _has_end_mark(shard: Path, position: int) -> bool:
    with shard.open("rb") as file:
        file.seek(position)
        return file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)


def _sample(
    shard: Path, key: tuple[PurePosixPath, str] | None, files: dict[str, bytes], too_large: int
) -> Iterator[Encoded | Unreadable]:
    if key is None:
        return
    found = [ending for ending in ("jpg", "jpeg", "png", "webp") if ending in files]
    path = printable(f"{shard}: {key[0] / key[1]}")
    if too_large:
        yield Unreadable(path, f"a file of {too_large:,} bytes, more than a sample may have")
    elif not found or "cls" not in files:
        yield Unreadable(path, printable(f"expected an image and .cls, found {', '.join(files)}"))
    elif not files["cls"].strip().isdigit():
        yield Unreadable(path, f".cls must be a number, got {shown(files['cls'][:20])}")
    else:
        yield Encoded(files[found[0]], int(files["cls"]), f"{path}.{found[0]}")
