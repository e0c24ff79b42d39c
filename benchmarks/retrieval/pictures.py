"""The pictures: cut-outs on white by category, and parts of photographs."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torchvision.transforms.functional import normalize, to_tensor

from . import downloads

#: A category counts if it has this many pictures, and of a larger one the first this many are taken.
LEAST, MOST = 6, 18

#: Folders of letters and signs, and of drawings, of which the package has many that differ in a stroke.
NO_CATEGORIES = ("symbols", "cartoon")

#: Photographs by the Python package that has them, and its folder; one of each scene.
OF_PACKAGES = {
    "skimage": (
        "data",
        "astronaut.png brick.png camera.png chelsea.png coffee.png coins.png grass.png gravel.png "
        "hubble_deep_field.jpg moon.png motorcycle_left.png retina.jpg rocket.jpg",
    ),
    "sklearn": ("datasets/images", "china.jpg flower.jpg"),
}
#: Those of Debian's package of OpenCV's samples.
OF_OPENCV = (
    "usr/share/doc/opencv-doc/examples",
    "alphamat/input_images/plant.jpg data/aloeL.jpg data/baboon.jpg data/board.jpg data/building.jpg "
    "data/butterfly.jpg data/fruits.jpg data/graf1.png data/home.jpg data/leuvenA.jpg data/messi5.jpg "
    "data/rubberwhale1.png data/squirrel_cls.jpg hfs/data/000.jpg text/scenetext01.jpg",
)

#: A photograph is cut into 3 × 2 parts, 3 along its longer side, if each then has so many pixels a side.
LEAST_SIDE = 100


class Pictures(NamedTuple):
    """A set of pictures with classes.

    Attributes:
        images: normalised as ImageNet's, float32 [B, 3, side, side].
        labels: int64 [B].
        classes: their names.
        rule: how they were chosen, a sentence.
    """

    images: Tensor
    labels: Tensor
    classes: list[str]
    rule: str


def cut_outs(folder: Path, side: int) -> Pictures:
    """Return cut-outs in the middle of a white square, by the folder that they are in.

    Args:
        folder: in which PNG files with transparency are, folder by folder.
        side: pixels.
    """
    by_class = defaultdict(list)
    for file in sorted(folder.rglob("*.png")):
        path = file.parent.relative_to(folder)
        if not set(path.parts) & set(NO_CATEGORIES):
            by_class[path.as_posix()].append(file)
    chosen = {name: files[:MOST] for name, files in sorted(by_class.items()) if len(files) >= LEAST}
    images = [tensor(on_white(Image.open(file)), side) for files in chosen.values() for file in files]
    rule = (
        f"the folders with at least {LEAST} pictures, of each the first {MOST} by name, without those below "
        f"folders named {' or '.join(NO_CATEGORIES)}"
    )
    return _pictures(images, {name: len(files) for name, files in chosen.items()}, rule)


def on_white(image: Image.Image) -> Image.Image:
    """Return a cut-out, without its transparent margins, on a white square 8/7 as wide as its longer side."""
    image = image.convert("RGBA")
    image = image.crop(image.getchannel("A").getbbox())
    width = round(max(image.size) * 8 / 7)
    square = Image.new("RGBA", (width, width), "white")
    corner = ((width - image.width) // 2, (width - image.height) // 2)
    square.alpha_composite(image, corner)
    return square.convert("RGB")


def parts(photographs: list[Path], side: int) -> Pictures:
    """Return six parts of each photograph, which do not overlap; a photograph is a class."""
    images, counts = [], {}
    for file in photographs:
        cut = six_parts(Image.open(file).convert("RGB"))
        if min(cut[0].size) >= LEAST_SIDE:
            images += [tensor(part, side) for part in cut]
            counts[file.stem] = len(cut)
    rule = f"six parts of each photograph, squares of at least {LEAST_SIDE} pixels that do not overlap"
    return _pictures(images, counts, rule)


def six_parts(photograph: Image.Image) -> list[Image.Image]:
    """Return the largest squares in the middle of the 3 × 2 cells, 3 along the longer side."""
    across, down = (3, 2) if photograph.width >= photograph.height else (2, 3)
    width, height = photograph.width // across, photograph.height // down
    square = min(width, height)
    found = []
    for row in range(down):
        for column in range(across):
            left, top = column * width + (width - square) // 2, row * height + (height - square) // 2
            found.append(photograph.crop((left, top, left + square, top + square)))
    return found


def tensor(image: Image.Image, side: int) -> Tensor:
    """Return an RGB image, resized bicubically and normalised as ImageNet's, [3, side, side]."""
    resized = image.resize((side, side), Image.Resampling.BICUBIC)
    return normalize(to_tensor(resized), IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)


def _pictures(images: list[Tensor], counts: dict[str, int], rule: str) -> Pictures:
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(list(counts.values())))
    return Pictures(torch.stack(images), labels, list(counts), rule)


def find(folder: Path, side: int) -> tuple[dict[str, Pictures], list[str]]:
    """Return the sets of pictures, downloaded below `folder`, and what is missing of them, with reasons."""
    found, missing, photographs = {}, [], []
    try:
        stamps = downloads.debian_package(downloads.STAMPS, folder) / "usr/share/tuxpaint/stamps"
        found["cut-outs on white"] = cut_outs(stamps, side)
    except downloads.Unavailable as reason:
        missing.append(f"cut-outs: {reason}")
    for module, (inside, names) in OF_PACKAGES.items():
        try:
            photographs += [downloads.package_folder(module, inside) / name for name in names.split()]
        except downloads.Unavailable as reason:
            missing.append(f"photographs: {reason}")
    inside, names = OF_OPENCV
    try:
        examples = downloads.debian_package(downloads.OPENCV, folder) / inside
        photographs += [examples / name for name in names.split()]
    except downloads.Unavailable as reason:
        missing.append(f"photographs: {reason}")
    if photographs:
        found["parts of photographs"] = parts(photographs, side)
    return found, missing
