"""Splits that are tar files, listed by timm's reader."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from timm.data.readers import img_extensions
from timm.data.readers.reader_image_in_tar import ReaderImageInTar

from evit_ext.data.images import endings, printable
from evit_ext.data.listing import LAYOUT


def open_tar(root: Path) -> tuple[ReaderImageInTar, list[str]]:
    """Return timm's reader of a tar file or a folder of them, and what there is to say about it.

    Raises:
        ValueError: there are no images, images outside of class folders, or at different depths.
    """
    try:
        with _reading_all_endings():
            # No cache: timm would store a pickle in the data folder, where others may be able to write.
            reader = ReaderImageInTar(str(root), cache_tarinfo=False)
    except (RuntimeError, ValueError, AssertionError, tarfile.TarError) as error:
        raise ValueError(f"{root} holds no images: expected {LAYOUT} ({error})") from error
    if "" in reader.class_name_to_idx:
        raise ValueError(f"{root} holds images outside of the classes' folders: expected {LAYOUT}")
    _check_depth(reader, root)
    skipped = _skipped_members(root)
    said = f"{root}: {skipped:,} files skipped, whose names do not end as an image that Pillow reads"
    return reader, [said] if skipped else []


@contextmanager
def _reading_all_endings() -> Iterator[None]:
    """Have timm list all that Pillow reads; its own three endings afterwards."""
    before = img_extensions.get_img_extensions()
    img_extensions.set_img_extensions(sorted(endings()))
    try:
        yield
    finally:
        img_extensions.set_img_extensions(before)


def _check_depth(reader: Any, root: Path) -> None:
    """Raise ValueError unless all images lie at <class>/<image> below one common folder.

    timm takes the innermost folder for the class, so classes would be those of cat/2023/x.jpg.
    """
    places = []
    for member, parent, child in reader.samples:
        parts = [Path(parent).stem] if parent else []
        parts += [Path(child.name).stem] if child is not None else []
        places.append((*parts, *Path(os.path.normpath(os.path.dirname(member.path))).parts))
    first, last = min(places), max(places)
    differ = (number for number, (one, other) in enumerate(zip(first, last)) if one != other)  # noqa: B905
    shared = next(differ, min(len(first), len(last)) - (first == last))
    for place in places:
        if len(place) != shared + 1:
            raise ValueError(
                f"{root} has images at different depths, such as {printable('/'.join(place))}: of a tar "
                f"file the innermost folder is the class; expected {LAYOUT}, or unpack it: of folders the "
                "first level is the class"
            )


def _skipped_members(root: Path) -> int:
    count = 0
    for path in [root] if root.suffix == ".tar" else sorted(root.glob("*.tar")):
        with tarfile.open(path) as tar:
            names = [member.name for member in tar if member.isfile()]
        count += sum(os.path.splitext(name)[1].lower() not in {*endings(), ".tar"} for name in names)
    return count
