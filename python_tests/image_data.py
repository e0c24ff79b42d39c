"""Image data sets made on the spot: crops of scikit-learn's photographs, as folders, tar files, shards."""

from __future__ import annotations

import io
import json
import struct
import tarfile
import zlib
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

from evit_ext.data.digits import INK_MAX, load_scans

CLASSES = ("china", "flower")
#: What timm says of a model that wants small images.
IMAGE = {
    "input_size": (3, 32, 32),
    "mean": (0.5, 0.4, 0.3),
    "std": (0.2, 0.25, 0.3),
    "interpolation": "bicubic",
    "crop_pct": 0.9,
}


@cache
def _photographs() -> list[np.ndarray]:
    return list(load_sample_images().images)


def crop(label: int, number: int) -> Image.Image:
    """The crop of a photograph that has this number, of a size of its own; no two are equal."""
    photograph = _photographs()[label]
    top, left = 7 * number % 350, 31 * number % 550
    height, width = 40 + number % 9, 44 + number % 13
    return Image.fromarray(photograph[top : top + height, left : left + width])


def encoded(label: int, number: int) -> bytes:
    """That crop as a JPEG file."""
    file = io.BytesIO()
    crop(label, number).save(file, "JPEG", quality=90)
    return file.getvalue()


def write_folder(root: Path, train: int = 7, val: int = 5) -> Path:
    """Write `root`/train and `root`/val with a folder for each class, and so many images in each of them."""
    for split, count, first in (("train", train, 0), ("val", val, 100)):
        for label, name in enumerate(CLASSES):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                (folder / f"{number}.jpg").write_bytes(encoded(label, first + number))
    return root


def write_photographs_and_digits(root: Path, train: int, val: int) -> Path:
    """Write a folder of twelve classes: pieces of the two photographs, and the ten digits, as they come."""
    write_folder(root, train, val)
    for split, count in (("train", train), ("val", val)):
        scans, labels = load_scans({"val": "test"}.get(split, split))
        for digit in range(10):
            folder = root / split / f"digit {digit}"
            folder.mkdir()
            for number, scan in enumerate(scans[labels == digit][:count]):
                gray = Image.fromarray((scan * (255 / INK_MAX)).astype(np.uint8))
                gray.resize((40, 40)).save(folder / f"{number}.png")
    return root


def write_tars(folder: Path, root: Path) -> Path:
    """Write every split of a folder as one tar file in `root`."""
    root.mkdir()
    for split in folder.iterdir():
        with tarfile.open(root / f"{split.name}.tar", "w") as tar:
            for path in sorted(split.rglob("*.jpg")):
                tar.add(path, path.relative_to(split))
    return root


def write_shards(folder: Path, root: Path, shards: int, uneven: bool = False) -> Path:
    """Write every split of a folder as WebDataset's shards, with timm's _info.json.

    `uneven` puts half of the images into the first shard.
    """
    root.mkdir()
    info = {}
    for split in sorted(folder.iterdir()):
        paths = sorted(split.rglob("*.*"))
        parts = [paths[number::shards] for number in range(shards)]
        if uneven:
            half = len(paths) // 2
            parts = [paths[:half], *(paths[half + number :: shards - 1] for number in range(shards - 1))]
        names = [f"{split.name}-{number:03}.tar" for number in range(shards)]
        for name, part in zip(names, parts, strict=True):
            with tarfile.open(root / name, "w") as tar:
                for path in part:
                    key = f"{path.parent.name}_{path.stem}"
                    label = str(CLASSES.index(path.parent.name)).encode()
                    for ending, data in ((path.suffix[1:], path.read_bytes()), ("cls", label)):
                        member = tarfile.TarInfo(f"{key}.{ending}")
                        member.size = len(data)
                        tar.addfile(member, io.BytesIO(data))
        info[split.name] = {
            "name": split.name,
            "num_samples": len(paths),
            "filenames": names,
            "shard_lengths": [len(part) for part in parts],
        }
    (root / "_info.json").write_text(json.dumps({"splits": info}))
    return root


def write_parquet(folder: Path, root: Path, files: int = 1) -> Path:
    """Write every split of a folder as Parquet files, as Hugging Face's data sets are stored."""
    from datasets import ClassLabel, Dataset, Features
    from datasets import Image as ImageFeature

    root.mkdir()
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=list(CLASSES))})
    for split in sorted(folder.iterdir()):
        rows = [
            {
                "image": {"bytes": path.read_bytes(), "path": f"{path.parent.name}_{path.name}"},
                "label": CLASSES.index(path.parent.name),
            }
            for path in sorted(split.rglob("*.*"))
        ]
        name = {"val": "validation"}.get(split.name, split.name)
        for number in range(files):
            part = Dataset.from_list(rows[number::files], features=features)
            part.to_parquet(root / f"{name}-{number:05}-of-{files:05}.parquet")
    return root


def huge_png() -> bytes:
    """A PNG whose header says 100,000 x 100,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def damage(folder: Path) -> dict[str, str]:
    """Spoil images of a class' folder, each in another way; returns their names and parts of the reasons."""
    names = sorted(path.name for path in folder.iterdir())
    truncated, text, empty, huge = names[:4]
    whole = (folder / truncated).read_bytes()
    (folder / truncated).write_bytes(whole[:-200])
    (folder / text).write_text("no image at all\n")
    (folder / empty).write_bytes(b"")
    (folder / huge).write_bytes(huge_png())
    return {truncated: "truncated", text: "not an image", empty: "not an image", huge: "100000x100000"}
