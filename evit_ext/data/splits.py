"""The splits of a data set whose images can be read in any order: folders, tar files, Hugging Face's Arrow.

timm's readers list tar files and Arrow data sets. Folders are listed by :mod:`evit_ext.data.listing`, because
timm takes the innermost folder for the class, reads three kinds of files and skips all others without a word.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from PIL import Image

from evit_ext._util.messages import shown
from evit_ext.data.classes import match_classes
from evit_ext.data.images import ImageLimits, Unreadable, printable, read_image
from evit_ext.data.listing import LAYOUT, ListedImage, Listing, hold_out, list_images

# Other folder names that are accepted for a split, as in timm's scripts.
_SYNONYMS = (
    ("train", "training"),
    ("val", "valid", "validation", "eval", "evaluation"),
)
_OTHER_SPLITS = ("test", "testing")


class ImageFiles:
    """The images of a split, by index.

    Args:
        reader: its ``len``, ``[index]`` (an open file and its label) and ``filename(index)``; one of timm's
            readers, or :class:`FolderReader`.
        source: where the images come from, for messages.
        limits: see :class:`ImageLimits`.
        words: see below.
        in_tars: whether the reader is timm's of tar files.

    Attributes:
        classes: the number of every class by name; empty if the data set does not list them.
        words: what there is to say about the data, such as which files are skipped; a line each.
    """

    def __init__(
        self,
        reader: Any,
        source: str,
        limits: ImageLimits,
        words: Sequence[str] = (),
        in_tars: bool = False,
    ) -> None:
        self.reader = reader
        self._in_tars = in_tars
        self.source = source
        self.limits = limits
        self.words = list(words)
        # Readers of tar files use another name.
        classes = getattr(reader, "class_to_idx", None) or getattr(reader, "class_name_to_idx", None) or {}
        self.classes: dict[str, int] = {printable(name): label for name, label in classes.items()}
        self._numbers: dict[int, int] | None = None
        self._names = {label: name for name, label in self.classes.items()}

    def __len__(self) -> int:
        return len(self.reader)

    def number_classes(self, known: Sequence[str], of_model: str) -> None:
        """Number the classes as a model does, whose classes are called `known`; matched by name.

        Raises:
            ValueError: there is a class that the model does not know.
        """
        if self.classes:
            self._numbers = match_classes(self.classes, known, self.source, of_model)

    def path(self, index: int) -> str:
        """Return an image's path: its file, or its name inside a tar file or data set."""
        if isinstance(self.reader, FolderReader):
            return printable(self.reader.filename(index, absolute=True))
        name = self.reader.filename(index, absolute=True)
        name = name and printable(name)
        if self._in_tars:
            parent = self.reader.samples[index][1]
            return f"{os.path.join(self.source, parent) if parent else self.source}: {name}"
        return f"{self.source}[{index}]" + (f": {name}" if name else "")

    def stem(self, index: int) -> str:
        """Return `<class>/<name>` of an image, without its ending."""
        name = self.reader.filename(index)
        if isinstance(self.reader, FolderReader):
            return os.path.splitext(name)[0]
        label = self.reader[index][1]
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

        image = read_image(open_image, self.path(index), self.limits)
        if isinstance(image, Unreadable):
            return image
        return image, label if self._numbers is None else self._numbers.get(label, label)


class FolderReader:
    """The listed images of a folder, as timm's readers have theirs.

    Args:
        images: each with the name of its class.
        classes: their names, in the order of their numbers.
    """

    def __init__(self, root: str, images: Sequence[ListedImage], classes: Sequence[str]) -> None:
        self.root = root
        self.class_to_idx = {name: number for number, name in enumerate(classes)}
        self.paths = [image.path for image in images]
        self.targets = [self.class_to_idx[image.class_name] for image in images]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[IO[bytes], int]:
        return open(self.paths[index], "rb"), self.targets[index]

    def filename(self, index: int, absolute: bool = False) -> str:
        """Return an image's path, `absolute` or from the folder."""
        return self.paths[index] if absolute else os.path.relpath(self.paths[index], self.root)


class Part(NamedTuple):
    """Where a split's images are: a folder or tar file, and whether all of them belong to the split.

    Attributes:
        root: the folder or tar file.
        part: "all", or of a split that has to be made "train" or "val".
        fraction: of the images that are held out for validation.
    """

    root: Path
    part: str = "all"
    fraction: float = 0.0


def find_parts(
    data: str | None, train_split: str, val_split: str, fraction: float
) -> tuple[Part | None, Part | None]:
    """Return where the images to train on and those to evaluate on are; None for a split that is not there.

    Where `data` has the folders of the classes in the place of splits, or only a training split, the images
    to evaluate on are a part of them that is not trained on, see :func:`hold_out`. Unlike timm's search, this
    never evaluates on training images.

    Args:
        data: the folder of the data set.
        train_split, val_split: names of the splits; "" for a validation split that is not wanted.
        fraction: share of the images to hold out where there is no validation split.

    Raises:
        ValueError: `data` is not given.
        FileNotFoundError: `data` is no folder, or has neither split.
    """
    folder = find_folder(data)
    train = _split(folder, train_split)
    val = _split(folder, val_split) if val_split else None
    wants_val = bool(val_split)
    usual_train, usual_val = train_split in _SYNONYMS[0], val_split in _SYNONYMS[1]
    splits = [name for name in (*_SYNONYMS[0], *_SYNONYMS[1], *_OTHER_SPLITS) if _split(folder, name)]
    has_classes = not splits and any(entry.is_dir() for entry in folder.iterdir())
    if has_classes and train is None and usual_train and (usual_val or not wants_val):
        train = folder
    has_test = any(name in _OTHER_SPLITS for name in splits)
    if train is not None and wants_val and val is None and usual_val and not has_test:
        return Part(train, "train", fraction), Part(train, "val", fraction)
    return Part(train) if train else None, Part(val) if val else None


def open_part(part: Part, limits: ImageLimits, listings: dict[str, Listing] | None = None) -> ImageFiles:
    """Open what :func:`find_parts` found.

    Args:
        part: of the data set.
        limits: see :class:`ImageLimits`.
        listings: of folders by their paths, which gets what is listed here: to list a large folder takes
            minutes.

    Raises:
        ValueError: there are no images, images outside of class folders, or a tar file that cannot be split.
    """
    root = part.root
    if root.suffix == ".tar" or any(root.glob("*.tar")):
        if part.part != "all":
            raise ValueError(
                f"{root} is of tar files, of which no part can be held out: {_no_split(root.parent, 'val')}"
            )
        from evit_ext.data.tar_files import open_tar  # here, because it brings torch, which takes seconds

        reader, said = open_tar(root)
        return ImageFiles(reader, str(root), limits, said, in_tars=True)
    listings = {} if listings is None else listings
    if str(root) not in listings:
        listings[str(root)] = list_images(root)
    listing = listings[str(root)]
    said = listing.words()
    if not listing.images:
        raise ValueError(
            f"{root} holds no images: expected {LAYOUT}" + "".join(f"; {words}" for words in said)
        )
    outside = [image for image in listing.images if not image.class_name]
    if outside:
        raise ValueError(
            f"{root} holds {len(outside)} images outside of the classes' folders, such as "
            f"{printable(os.path.relpath(outside[0].path, root))}: expected {LAYOUT}"
        )
    images = listing.images
    if part.part != "all":
        parts = dict(zip(("train", "val"), hold_out(images, part.fraction, listing.root), strict=True))
        images = parts[part.part]
        if part.part == "val":
            said = [_held_out(listing, len(images), part.fraction)]
    return ImageFiles(FolderReader(str(root), images, listing.classes), str(root), limits, said)


def _held_out(listing: Listing, count: int, fraction: float) -> str:
    if fraction == 1:
        return f"{listing.root}: it has no splits: all {count:,} images are evaluated"
    return (
        f"{listing.root}: it has no validation split: {count:,} of {len(listing.images):,} images, "
        f"{100 * fraction:g} % of each class, are held out of training for it"
    )


def open_arrow(dataset: str, data: str | None, split: str, limits: ImageLimits) -> ImageFiles:
    """Open a split of a Hugging Face Arrow data set, "hfds/NAME"; code that comes with it is never run.

    Args:
        dataset: "hfds/" and a name on the hub, or a local folder of, say, Parquet files.
        data: the cache folder.
        split: name of the split.
        limits: see :class:`ImageLimits`.

    Raises:
        ModuleNotFoundError: `datasets` is not installed.
    """
    need("datasets", dataset)
    from timm.data.readers import create_reader

    return ImageFiles(create_reader(dataset, root=data, split=split), f"{dataset} {split}", limits)


def find_split(data: str | None, split: str) -> Path:
    """Return the folder or tar file of a split.

    Raises:
        ValueError: `data` is not given.
        FileNotFoundError: `data` is not a folder, or does not have the split.
    """
    folder = find_folder(data)
    found = _split(folder, split)
    if found is None:
        raise no_split(folder, split)
    return found


def no_split(folder: Path, split: str) -> FileNotFoundError:
    """Return the error for a split that a folder does not have."""
    return FileNotFoundError(_no_split(folder, split))


def _split(folder: Path, split: str) -> Path | None:
    names = [split, *(name for group in _SYNONYMS if split in group for name in group)]
    places = (folder / f"{name}{ending}" for name in names for ending in ("", ".tar"))
    return next((path for path in places if path.exists()), None)


def _no_split(folder: Path, split: str) -> str:
    there = sorted(printable(entry.name) for entry in folder.iterdir() if not entry.name.startswith("."))
    hint = ""
    if split not in _SYNONYMS[0]:
        other = next((name for name in _OTHER_SPLITS if name in there), None)
        hint = f"; to evaluate on {other}: --val-split {other}" if other else ""
    found = ", ".join(there[:8]) + (f" and {len(there) - 8} more" if len(there) > 8 else "")
    return (
        f"{folder} has no split {shown(split)}: expected a folder {split} with {LAYOUT}, found "
        f"{found or 'nothing'}{hint}"
    )


def find_folder(data: str | None) -> Path:
    """Return the folder of a data set.

    Raises:
        ValueError: `data` is not given.
        FileNotFoundError: `data` is not a folder.
    """
    if data is None:
        raise ValueError("data must be the folder that has the data set, got none: --data FOLDER")
    if not Path(data).is_dir():
        there = f"{data} is a file" if Path(data).is_file() else f"there is no {data} in {Path.cwd()}"
        raise FileNotFoundError(f"data must be a folder with the data set's splits; {there}")
    return Path(data)


def need(package: str, dataset: str) -> None:
    """Raise ModuleNotFoundError with advice unless a package is installed."""
    if importlib.util.find_spec(package) is None:
        raise ModuleNotFoundError(f'data set {shown(dataset)} needs {package}: pip install "evit_ext[data]"')
