"""Images from files, read so that a bad image is reported instead of ending the run.

timm's readers list and open the images. We decode them ourselves, because timm's decoding skips unreadable
images with only a line in the log and has no limit on image size.
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

# Other folder names that timm's scripts accept for a split.
_SYNONYMS = (
    ("train", "training"),
    ("val", "valid", "validation", "eval", "evaluation"),
)
# Formats for which Pillow runs another program, Ghostscript, on an untrusted file.
_NOT_OPENED = {"EPS"}
_LAYOUT = "<class>/<image> in it, or a .tar of these"
# Errors of the machine, not of the image: the next image would fail as well.
_MACHINE_ERRORS = {errno.EMFILE, errno.ENFILE, errno.ENOMEM}


class Unreadable(NamedTuple):
    """An image that could not be read: its path and what was wrong."""

    path: str
    reason: str


class ImageFiles:
    """The images of a split, by index.

    Args:
        reader: one of timm's readers.
        source: where the images come from, for messages.
        max_pixels: a larger image counts as unreadable; the size in its header is checked before anything is
            decoded.

    Attributes:
        classes: the number of every class by name; empty if the data set does not list them.
    """

    def __init__(self, reader: Any, source: str, max_pixels: int) -> None:
        self.reader = reader
        self.source = source
        self.max_pixels = max_pixels
        # Readers of tar files use another name.
        classes = getattr(reader, "class_to_idx", None) or getattr(reader, "class_name_to_idx", None)
        self.classes: Mapping[str, int] = classes or {}
        self._names = {label: name for name, label in self.classes.items()}

    def __len__(self) -> int:
        return len(self.reader)

    def path(self, index: int) -> str:
        """Return an image's path: its file, or its name inside a tar file or data set."""
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
        """Return an RGB image and its label, or the reason why it is unreadable.

        Raises:
            MemoryError, OSError: the machine has run out of memory or open files.
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
        open_file: returns the file; if it raises, the image counts as unreadable.
        path: for the report.
        max_pixels: a larger image counts as unreadable and is not decoded.

    Returns:
        The RGB image, or a report of why it is unreadable.

    Raises:
        MemoryError, OSError: the machine has run out of memory or open files.
    """
    try:
        with open_file() as file, _pixel_limit(None), Image.open(file, formats=_formats()) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise ValueError(f"{width}x{height} pixels, more than max_image_pixels {max_pixels}")
            # In some formats the image's size can differ from the header's, so Pillow checks again.
            with _pixel_limit(max_pixels):
                return image.convert("RGB")
    except MemoryError:
        raise
    except UnidentifiedImageError:
        return Unreadable(path, "not an image that Pillow knows")
    # On damaged data, Pillow's decoders raise nearly anything, from SyntaxError to struct.error.
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
    """Make Pillow refuse images with more pixels than `limit`, without warnings at its own limit."""
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
        dataset: "" for a folder or tar files, or "hfds/NAME" for a Hugging Face Arrow data set, from the hub
            or a local folder of, say, Parquet files. Code that comes with a data set is never run.
        data: the folder with the splits. Each split is a folder `split` (or a common synonym) with a folder
            for each class, a file `split`.tar, or a folder of tar files. For "hfds/NAME": the cache folder.
        split: name of the split.
        max_pixels: see :class:`ImageFiles`.

    Raises:
        ValueError: `data` is not given, or there are no images, or none in class folders.
        FileNotFoundError: the folder or split does not exist.
        ModuleNotFoundError: "hfds" needs `datasets`.
    """
    if dataset:
        need("datasets", dataset)
        return ImageFiles(create_reader(dataset, root=data, split=split), f"{dataset} {split}", max_pixels)
    root = find_split(data, split)
    try:
        if root.suffix == ".tar" or any(root.glob("*.tar")):
            # No cache: timm would store a pickle in the data folder, where others may be able to write.
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
    """Return the folder or tar file of a split.

    Unlike timm's search, this does not fall back to the whole folder: a run without a validation split would
    then silently be evaluated on its training images.

    Raises:
        ValueError: `data` is not given.
        FileNotFoundError: `data` is not a folder, or does not have the split.
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
        FileNotFoundError: `data` is not a folder.
    """
    if data is None:
        raise ValueError("data must be the folder that has the data set's splits, got none")
    if not Path(data).is_dir():
        there = f"{data} is a file" if Path(data).is_file() else f"there is no {data}"
        raise FileNotFoundError(f"data must be a folder with the data set's splits; {there}")
    return Path(data)


def need(package: str, dataset: str) -> None:
    """Raise ModuleNotFoundError with advice unless a package is installed."""
    if importlib.util.find_spec(package) is None:
        raise ModuleNotFoundError(f'data set {dataset!r} needs {package}: pip install "evit_ext[data]"')
