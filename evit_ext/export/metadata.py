"""What a file with an exported model says about it, and how it is read."""

from __future__ import annotations

import errno
import json
import lzma
import os
import typing
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any
from xml.parsers import expat

import timm.data
import torch
from torch import nn

from evit_ext._util.hints import as_hinted
from evit_ext._util.messages import reason, shortened, shown
from evit_ext._util.version import VERSION
from evit_ext.patching.keep_rates import keep_rates

#: The name under which the formats hold it: a property of ONNX files, run-time information of OpenVINO's, a
#: key of AOTInductor's metadata.
KEY = "evit"

#: Bytes that it has at most: names of ImageNet's 21,841 classes have half a million.
_LARGEST = 2**24

#: Bytes of OpenVINO's file of a graph, at most; that of a ViT of 48 blocks has some 4 million.
_LARGEST_GRAPH = 2**26

#: The file of it in a torch.export archive.
FILE = f"{KEY}.json"


@dataclass(frozen=True)
class Metadata:
    """What one must know about a model to use it.

    Attributes:
        model: its name.
        keep_rate: of its stages; one number if all are the same.
        input_size: (channels, height, width) of images.
        mean, std: for each channel, to normalise images in [0, 1].
        interpolation: how to resize images, in timm's terms.
        crop_pct: share of a resized image's shorter side that remains after cropping.
        crop_mode: how an image is resized before its centre is cut out, as timm names it: "center", by its
            shorter side; "border", by its longer side, with a border of the mean; "squash", to the model's
            shape whatever its own is.
        dtype: of the images and the logits, e.g. "float32".
        max_batch: the largest batch, or None if there is no limit.
        classes: names of the logits, or None if they are not known.
        quantization: "int8" if weights are in 8 bits, None if not; images and logits are of `dtype`.
        evit_ext, torch: the versions that wrote the file.
    """

    model: str
    keep_rate: tuple[float, ...]
    input_size: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    crop_pct: float
    crop_mode: str = "center"
    dtype: str = "float32"
    max_batch: int | None = None
    classes: tuple[str, ...] | None = None
    quantization: str | None = None
    evit_ext: str = VERSION
    torch: str = torch.__version__

    def to_json(self) -> str:
        """Return all of it on one line."""
        return json.dumps(asdict(self), ensure_ascii=False)

    def to_strings(self) -> dict[str, str]:
        """Return the fields that are known as strings, for readers without a JSON parser.

        The key of a field is `evit.` and its name. Numbers of a list are separated by spaces, names of
        classes by line breaks.
        """
        found = {}
        for entry in fields(self):
            value = getattr(self, entry.name)
            if entry.name == "classes":
                value = None if value is None else "\n".join(" ".join(name.splitlines()) for name in value)
            elif isinstance(value, tuple):
                value = " ".join(map(str, value))
            if value is not None:
                found[f"{KEY}.{entry.name}"] = str(value)
        return found

    @classmethod
    def from_json(cls, text: str) -> Metadata:
        """Return what :meth:`to_json` wrote; fields that a newer version may have are passed over.

        Raises:
            ValueError: it wrote something else.
        """
        try:
            found = json.loads(text)
            if not isinstance(found, dict):
                raise TypeError(f"expected fields and their values, got {shown(found)}")
            hints = typing.get_type_hints(cls)
            values = {key: as_hinted(value, hints[key]) for key, value in found.items() if key in hints}
            return cls(**values)
        except (ArithmeticError, RecursionError, TypeError, ValueError) as error:
            raise ValueError(f"damaged metadata: {reason(error)}") from error


def describe(
    model: nn.Module,
    name: str,
    image_size: int | tuple[int, int] | None = None,
    classes: Sequence[str] | None = None,
    crop_pct: float | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    max_batch: int | None = None,
    quantization: str | None = None,
) -> Metadata:
    """Return what is to be said of `model`.

    Args:
        model: takes images [B, channels, height, width].
        name: of the model.
        image_size: height and width; None is the model's own.
        classes: names of the logits.
        crop_pct, mean, std: None is the model's own, for a module that does not know timm's default.
        max_batch: the most images at once, None for any number.
        quantization: "int8", or None.
    """
    size: Any = image_size
    if size is None:
        size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    asked: dict[str, Any] = {}
    if size is not None:
        asked["img_size"] = size if isinstance(size, int) else size[0]
    if crop_pct is not None:
        asked["crop_pct"] = crop_pct
    # A module without timm's settings, such as a wrapper, gets timm's defaults.
    config = timm.data.resolve_data_config(
        asked, pretrained_cfg=getattr(model, "pretrained_cfg", None) or {}, use_test_size=False
    )
    channels, *own = config["input_size"]
    height_and_width = own if size is None else [size, size] if isinstance(size, int) else size
    return Metadata(
        model=name,
        keep_rate=tuple(keep_rates(model)) if hasattr(model, "blocks") else (),
        input_size=(channels, *height_and_width),
        mean=tuple(config["mean"] if mean is None else mean),
        std=tuple(config["std"] if std is None else std),
        interpolation=config["interpolation"],
        crop_pct=config["crop_pct"],
        crop_mode=config["crop_mode"],
        dtype=str(next(model.parameters(), torch.zeros(())).dtype).removeprefix("torch."),
        max_batch=max_batch,
        classes=None if classes is None else tuple(classes),
        quantization=quantization,
    )


def read_metadata(file: str | os.PathLike[str]) -> Metadata:
    """Return what an exported file says about its model.

    Nothing in the file is executed, and no more than 16 MiB of an archive are decompressed.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file has no metadata, or is damaged.
        RuntimeError: it is an ONNX file, and the package onnx is missing.
    """
    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}")
    try:
        text = _of_archive(path) if zipfile.is_zipfile(path) else _of_graph(path)
        found = None if text is None else Metadata.from_json(text)
    except _DAMAGED as error:
        raise ValueError(f"{path} is damaged: {reason(error)}") from error
    if found is None:
        raise ValueError(f"{path} was not written by evit export")
    return found


#: What comes of reading archives that were made to fail.
_DAMAGED = (
    EOFError, NotImplementedError, RecursionError, ValueError, lzma.LZMAError, zipfile.BadZipFile, zlib.error
)  # fmt: skip


def _of_archive(path: Path) -> str | None:
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if name.endswith(f"/extra/{FILE}"):
                return _member(archive, name)
            # An AOTInductor package's: what was given to AOTInductor, and some entries of its own.
            if "/aotinductor/" in name and name.endswith("_metadata.json"):
                found = json.loads(_member(archive, name))
                if isinstance(found, dict) and isinstance(found.get(KEY), str):
                    return str(found[KEY])
    return None


def _member(archive: zipfile.ZipFile, name: str) -> str:
    """Return the text of a file in an archive, which may claim another size than it has."""
    if archive.getinfo(name).flag_bits & 1:
        raise ValueError(f"{shortened(name)} in it is encrypted")
    try:
        with archive.open(name) as file:
            data = file.read(_LARGEST + 1)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise  # of the disk, not of what is on it
        raise ValueError(f"{shortened(name)} would lie outside of it") from error
    if len(data) > _LARGEST:
        raise ValueError(f"{shortened(name)} in it has more than {_LARGEST} bytes")
    return data.decode()


def _of_graph(path: Path) -> str | None:
    with path.open("rb") as file:
        is_xml = file.read(1) == b"<"
    return _of_openvino(path) if is_xml else _of_onnx(path)


def _of_openvino(path: Path) -> str | None:
    """Return what OpenVINO's file of a graph has among its run-time information; nothing is built of it."""
    size = path.stat().st_size
    if size > _LARGEST_GRAPH:
        raise ValueError(f"it has {size} bytes, and a graph without weights no more than {_LARGEST_GRAPH}")
    found: list[str] = []
    inside: list[str] = []

    def start(name: str, attributes: dict[str, str]) -> None:
        inside.append(name)
        if inside == ["net", "rt_info", KEY]:
            found.append(attributes.get("value", ""))

    def refuse(name: str, *_: Any) -> None:
        raise ValueError(f"it declares an entity, {shown(name)}, which OpenVINO's files do not")

    parser = expat.ParserCreate()
    parser.StartElementHandler = start
    parser.EndElementHandler = lambda name: inside.pop()
    parser.EntityDeclHandler = refuse
    try:
        with path.open("rb") as file:
            parser.ParseFile(file)
    except expat.ExpatError as error:
        raise ValueError(f"not XML: {reason(error)}") from error
    return found[0] if found else None


def _of_onnx(path: Path) -> str | None:
    from evit_ext.export.packages import require

    require("onnx")
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load(str(path), load_external_data=False)
    except DecodeError:
        return None
    return next((entry.value for entry in model.metadata_props if entry.key == KEY), None)
