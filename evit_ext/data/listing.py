"""Which files of a folder are images, of which class, and which are skipped and why."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from evit_ext.data.images import endings, printable

#: What a split is expected to be.
LAYOUT = "<class>/<image> in it, or a .tar of these"

# Device and number of a folder, the same for all links to it.
_Identity = tuple[int, int]
_ABOVE = "links to a folder above them"

# This many names are told in a message; of more, the number.
_TOLD = 5


class ListedImage(NamedTuple):
    """The path of an image file, and the name of its class; "" for a file outside of any class folder."""

    path: str
    class_name: str


def natural_key(text: str) -> list[int | str]:
    """Return what timm sorts paths and classes by: numbers as numbers.

    Its function of this name brings torch, and fails on a name such as "²".
    """
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", text.lower())]


@dataclass
class Listing:
    """The files of a folder.

    Attributes:
        root: the folder.
        images: sorted as timm sorts them, by their paths with numbers as numbers.
        skipped: what is not read, as a path each, by the reason.
        nested: an image deeper than <class>/<image>; "" if there is none.
    """

    root: str
    images: list[ListedImage] = field(default_factory=list)
    skipped: dict[str, list[str]] = field(default_factory=dict)
    nested: str = ""

    @property
    def classes(self) -> list[str]:
        """The names of the classes that have images, sorted as timm numbers them."""
        return sorted({image.class_name for image in self.images}, key=natural_key)

    def words(self) -> list[str]:
        """Return what there is to say about the folder: what is skipped, and where classes come from."""
        said = [
            f"{self.root}: {_counted(len(paths), 'file')} skipped, {reason} ({_some(paths, self.root)})"
            for reason, paths in self.skipped.items()
        ]
        if self.nested:
            inside = os.path.relpath(self.nested, self.root)
            class_name = inside.split(os.sep)[0]
            said.append(
                f"{self.root}: images in deeper folders belong to the class of the first: "
                f"{printable(inside)} is of class {printable(class_name)}"
            )
        return said


def list_images(root: str | os.PathLike[str]) -> Listing:
    """List a folder that has a folder for each class, with the images in it, however deep.

    An image is a file whose name ends as one that Pillow reads (:func:`evit_ext.data.images.endings`).
    Hidden files and folders, whose names begin with a dot, are skipped.

    Raises:
        OSError: the folder cannot be read.
        ValueError: two class folders have names that only differ in how letters are composed, or are one
            folder, by a link: the same images would be of two classes.
    """
    listing = Listing(str(root))
    folders: dict[str, str] = {}
    whole = _identity(root)
    seen: dict[_Identity, str] = {}
    skip = listing.skipped
    for entry in _entries(str(root)):
        if entry.name.startswith("."):
            skip.setdefault("hidden", []).append(entry.path)
        elif entry.is_dir():
            name, identity = printable(entry.name), _identity(entry.path)
            if identity == whole:
                skip.setdefault(_ABOVE, []).append(entry.path)
                continue
            if name in folders:
                raise ValueError(
                    f"{root} has two folders for the class {name}: {folders[name]!a} and {entry.name!a}"
                )
            folders[name] = entry.name
            before = len(listing.images)
            _of_one_class(seen, identity, name, entry.path)
            _walk(entry.path, name, listing, (whole, identity), seen)
            if len(listing.images) == before:
                skip.setdefault("class folders without an image", []).append(entry.path)
        else:
            _add(entry, "", listing)
    listing.images.sort(key=lambda image: natural_key(image.path))
    level = os.path.join(root, "class", "image").count(os.sep)
    deeper = (image.path for image in listing.images if image.path.count(os.sep) > level)
    listing.nested = next(deeper, "")
    return listing


def find_photos(paths: Sequence[str | Path]) -> Listing:
    """List image files by their paths, and folders of them, not their subfolders; for pictures.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: a folder has no image files.
    """
    found = Listing(str(paths[0]) if len(paths) == 1 else ".")
    for path in map(Path, paths):
        if path.is_dir():
            inside = Listing(str(path))
            for entry in sorted(_entries(str(path)), key=lambda entry: natural_key(entry.name)):
                if entry.name.startswith("."):
                    inside.skipped.setdefault("hidden", []).append(entry.path)
                elif entry.is_dir():
                    inside.skipped.setdefault("folders in the folder", []).append(entry.path)
                else:
                    _add(entry, "", inside)
            if not inside.images:
                skipped = "; ".join(inside.words())
                raise ValueError(
                    f"the folder {path} has no image files, such as .jpg, .png or .webp"
                    + (f": {skipped}" if skipped else "")
                )
            found.images += inside.images
            for reason, files in inside.skipped.items():
                found.skipped.setdefault(reason, []).extend(files)
        elif path.exists():
            found.images.append(ListedImage(str(path), ""))
        else:
            raise FileNotFoundError(f"there is no file or folder {path}")
    return found


def hold_out(
    images: Sequence[ListedImage], fraction: float, root: str
) -> tuple[list[ListedImage], list[ListedImage]]:
    """Split images into those to train on and those held out for validation, class by class.

    Which ones are held out follows from the hashes of their paths below `root`: it stays the same from run to
    run, on any machine, whatever the seed. A class of two or more images has at least one in either part,
    unless `fraction` is 1, which holds out all.
    """
    by_class: dict[str, list[ListedImage]] = {}
    for image in images:
        by_class.setdefault(image.class_name, []).append(image)
    held: set[ListedImage] = set()
    for members in by_class.values():
        count = round(fraction * len(members))
        if fraction < 1 and len(members) > 1:
            count = min(max(count, 1), len(members) - 1)
        held.update(sorted(members, key=lambda image: _hash(os.path.relpath(image.path, root)))[:count])
    return [image for image in images if image not in held], [image for image in images if image in held]


def _hash(path: str) -> bytes:
    return hashlib.sha256(os.fsencode(path)).digest()


def _of_one_class(seen: dict[_Identity, str], identity: _Identity, class_name: str, path: str) -> None:
    """Note which class a folder's images are of; ValueError if they are of another one, too."""
    other = seen.setdefault(identity, class_name)
    if other != class_name:
        raise ValueError(
            f"the images in {printable(path)} would be of two classes, {other} and {class_name}: a link "
            "leads to the folder; remove it"
        )


def _walk(
    folder: str, class_name: str, listing: Listing, above: tuple[_Identity, ...], seen: dict[_Identity, str]
) -> None:
    for entry in _entries(folder):
        if entry.name.startswith("."):
            listing.skipped.setdefault("hidden", []).append(entry.path)
        elif entry.is_dir():
            identity = _identity(entry.path)
            if identity in above:
                listing.skipped.setdefault(_ABOVE, []).append(entry.path)
            elif seen.get(identity) == class_name:
                listing.skipped.setdefault("links to a folder of the same class", []).append(entry.path)
            else:
                _of_one_class(seen, identity, class_name, entry.path)
                _walk(entry.path, class_name, listing, (*above, identity), seen)
        else:
            _add(entry, class_name, listing)


def _add(entry: os.DirEntry[str], class_name: str, listing: Listing) -> None:
    ending = os.path.splitext(entry.name)[1].lower()
    if ending not in endings():
        reason = f"Pillow reads no {printable(ending)}" if ending else "the name has no ending"
        listing.skipped.setdefault(reason, []).append(entry.path)
    elif not entry.is_file():
        # A pipe or device would be waited for without end; a link may lead nowhere.
        reason = "links to nothing" if entry.is_symlink() else "neither files nor folders"
        listing.skipped.setdefault(reason, []).append(entry.path)
    else:
        listing.images.append(ListedImage(entry.path, class_name))


def _entries(folder: str) -> Iterator[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        yield from entries


def _identity(folder: str | os.PathLike[str]) -> _Identity:
    found = os.stat(folder)
    return found.st_dev, found.st_ino


def _counted(number: int, one: str) -> str:
    return f"{number:,} {one if number == 1 else one + 's'}"


def _some(paths: Sequence[str], root: str) -> str:
    names = [printable(os.path.relpath(path, root)) for path in sorted(paths)[:_TOLD]]
    return ", ".join(names) + (f" and {len(paths) - _TOLD:,} more" if len(paths) > _TOLD else "")
