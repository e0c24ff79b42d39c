"""Images from files, read so that a bad one is a report and not the end of the run.

timm's readers say which images there are and open them; decoding is ours, because theirs skips what it cannot
read with no more than a line in the log, and has no limit on an image's size.
"""

from __future__ import annotations

import errno
import importlib.util
import os
import tarfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import IO, Any, NamedTuple

from PIL import Image, UnidentifiedImageError
from timm.data.readers import create_reader
from timm.data.readers.reader_image_folder import ReaderImageFolder
from timm.data.readers.reader_image_in_tar import ReaderImageInTar

# Folders that timm's scripts take for a split, too.
_SYNONYMS = (
    ("train", "training"),
    ("val", "valid", "validation", "eval", "evaluation"),
)
# What Pillow opens but has another program run, Ghostscript, on what may be anyone's file.
_NOT_OPENED = {"EPS"}
_LAYOUT = "<class>/<image> in it, or a .tar of these"
# Errors of the machine: no fault of the image, and there for the next one as well.
_MACHINE_ERRORS = {errno.EMFILE, errno.ENFILE, errno.ENOMEM}


class Unreadable(NamedTuple):
    """An image that could not be read: where it lies, and what was wrong."""

    path: str
    reason: str


class ImageFiles:
    """The images of a split, by index.

    Args:
        reader: of timm.
        source: what the images are of, for messages.
        max_pixels: a larger image counts as unreadable; the size in its header is looked at before anything
            is decoded.

    Attributes:
        classes: the name and number of every class; empty where the data set does not say.
    """

    def __init__(self, reader: Any, source: str, max_pixels: int) -> None:
        self.reader = reader
        self.source = source
        self.max_pixels = max_pixels
        # Readers of tar files have another name for it.
        classes = getattr(reader, "class_to_idx", None) or getattr(reader, "class_name_to_idx", None)
        self.classes: Mapping[str, int] = classes or {}
        self._names = {label: name for name, label in self.classes.items()}

    def __len__(self) -> int:
        return len(self.reader)

    def path(self, index: int) -> str:
        """Return where an image lies: its file, or its name inside of a tar file or data set."""
        name = self.reader.filename(index, absolute=True)
        if isinstance(self.reader, ReaderImageInTar):
            parent = self.reader.samples[index][1]
            return f"{os.path.join(self.source, parent) if parent else self.source}: {name}"
        if isinstance(self.reader, ReaderImageFolder):
            return name
        return f"{self.source}[{index}]" + (f": {name}" if name else "")

    def stem(self, index: int, label: int) -> str:
        """Return `<class>/<name>` of an image, without its ending."""
        name = self.reader.filename(index)
        if name is None or label not in self._names:
            raise ValueError(f"{self.path(index)} has no file name or no class name: it has no token labels")
        return f"{self._names[label]}/{Path(name).stem}"

    def read(self, index: int) -> tuple[Image.Image, int] | Unreadable:
        """Return an image in RGB and its label, or why there is none.

        Raises:
            MemoryError, OSError: the machine has run out of memory or of open files.
        """
        label = -1

        def open_image() -> IO[bytes]:
            nonlocal label
            file, target = self.reader[index]
            label = int(target)
            return file

        image = read_image(open_image, self.path(index), self.max_pixels)
        return image if isinstance(image, Unreadable) else (image, label)


def read_image(open_file: Callable[[], IO[bytes]], path: str, max_pixels: int) -> Image.Image | Unreadable:
    """Decode an image.

    Args:
        open_file: returns the file; what it raises counts against the image, too.
        path: for the report.
        max_pixels: a larger image counts as unreadable, and is not decoded.

    Returns:
        The image in RGB, or the report.

    Raises:
        MemoryError, OSError: the machine has run out of memory or of open files.
    """
    try:
        with open_file() as file, _pixel_limit(None), Image.open(file, formats=_formats()) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise ValueError(f"{width}x{height} pixels, more than max_image_pixels {max_pixels}")
            # Some formats hold an image of another size than the header's: Pillow checks again.
            with _pixel_limit(max_pixels):
                return image.convert("RGB")
    except MemoryError:
        raise
    except UnidentifiedImageError:
        return Unreadable(path, "not an image that Pillow knows")
    # Pillow's decoders raise nearly anything on damaged data, from SyntaxError to struct.error.
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _MACHINE_ERRORS:
            raise
        return Unreadable(path, f"{type(error).__name__}: {error}")


@cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in Image.ID if name not in _NOT_OPENED)


@contextmanager
def _pixel_limit(limit: int | None) -> Iterator[None]:
    """Have Pillow refuse images with more pixels than `limit`, and not warn from its own limit on."""
    before = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = limit
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def open_images(dataset: str, data: str | None, split: str, max_pixels: int) -> ImageFiles:
    """Open a split of a data set whose images can be read in any order.

    Args:
        dataset: "" for a folder or tar files, or "hfds/NAME" for an Arrow data set of Hugging Face's: on
            their hub, or a folder here that holds, say, Parquet files. Code that comes with a data set is
            never run.
        data: the folder that has the splits, each a folder `split` (or a usual synonym) with a folder for
            each class, a file `split`.tar, or a folder of tar files; of "hfds/NAME", the cache.
        split: its name.
        max_pixels: see :class:`ImageFiles`.

    Raises:
        ValueError: `data` is not given, or there are no images, or none in folders of classes.
        FileNotFoundError: there is no such folder or split.
        ModuleNotFoundError: "hfds" needs `datasets`.
    """
    if dataset:
        need("datasets", dataset)
        return ImageFiles(create_reader(dataset, root=data, split=split), f"{dataset} {split}", max_pixels)
    root = find_split(data, split)
    try:
        if root.suffix == ".tar" or any(root.glob("*.tar")):
            # No cache: it would be a pickle in the data's folder, which whoever can write there controls.
            reader = ReaderImageInTar(str(root), cache_tarinfo=False)
        else:
            reader = create_reader("", root=str(root))
    except (RuntimeError, ValueError, AssertionError, tarfile.TarError) as error:
        raise ValueError(f"{root} holds no images: expected {_LAYOUT} ({error})") from error
    files = ImageFiles(reader, str(root), max_pixels)
    if "" in files.classes:
        raise ValueError(f"{root} holds images outside of the classes' folders: expected {_LAYOUT}")
    return files


def find_split(data: str | None, split: str) -> Path:
    """Return the folder or the tar file of a split.

    Unlike timm's search it does not fall back to the whole folder: without one for validation, a run would
    silently be evaluated on its training images.

    Raises:
        ValueError: `data` is not given.
        FileNotFoundError: it is not a folder, or does not have the split.
    """
    folder = find_folder(data)
    names = [split, *(name for group in _SYNONYMS if split in group for name in group)]
    for name in names:
        for path in (folder / name, folder / f"{name}.tar"):
            if path.exists():
                return path
    found = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8])
    raise FileNotFoundError(
        f"{data} has no split {split!r}: expected a folder {split} with {_LAYOUT}, found {found or 'nothing'}"
    )


def find_folder(data: str | None) -> Path:
    """Return the folder of a data set.

    Raises:
        ValueError: `data` is not given.
        FileNotFoundError: it is not a folder.
    """
    if data is None:
        raise ValueError("data must be the folder that has the data set's splits, got none")
    if not Path(data).is_dir():
        there = f"{data} is a file" if Path(data).is_file() else f"there is no {data}"
        raise FileNotFoundError(f"data must be a folder with the data set's splits; {there}")
    return Path(data)


def need(package: str, dataset: str) -> None:
    """Raise ModuleNotFoundError with advice unless a package is there."""
    if importlib.util.find_spec(package) is None:
        raise ModuleNotFoundError(f'data set {dataset!r} needs {package}: pip install "evit_ext[data]"')
