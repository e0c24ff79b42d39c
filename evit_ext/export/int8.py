"""Models in int8, for ONNX Runtime and OpenVINO: products with weights in 8 bits, calibrated on images."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from evit_ext.data.batches import transformed
from evit_ext.data.images import ImageLimits, Unreadable, read_image
from evit_ext.data.listing import list_images
from evit_ext.export.metadata import Metadata
from evit_ext.export.program import refusing

#: The fewest images: one to compare the two models on, and some to calibrate on.
FEWEST = 4

#: Every so many of the images is kept from calibration, to compare the two models on.
_HELD_OUT = 4

_AT_ONCE = 8

#: Operators of ONNX that are quantised where their second input is a weight.
_QUANTISED = ("MatMul", "Gemm", "Conv")


def split(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the images to calibrate on and those to compare on, one in four.

    Raises:
        ValueError: there are fewer than :data:`FEWEST`.
    """
    if len(images) < FEWEST:
        raise ValueError(f"int8 needs at least {FEWEST} images to calibrate on, got {len(images)}")
    is_other = torch.arange(len(images)) % _HELD_OUT == _HELD_OUT - 1
    return images[~is_other], images[is_other]


def read_images(folder: Path, metadata: Metadata, most: int, max_pixels: int = 2**26) -> Tensor:
    """Return images of a folder and its subfolders as a model takes them, the same ones each time.

    Args:
        folder: of images, or of folders of them.
        metadata: of the model.
        most: how many at most; of more, some from everywhere in the folder.
        max_pixels: of an image.

    Returns:
        float32 [n, 3, height, width].

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it has no images, or one that cannot be read; or the model does not take RGB.
    """
    from timm.data import create_transform

    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder} of images to calibrate on")
    if metadata.input_size[0] != 3:
        raise ValueError(f"the model takes images of {metadata.input_size[0]} channels, and files have three")
    size: Any = metadata.input_size
    transform = create_transform(
        size,
        is_training=False,
        interpolation=metadata.interpolation,
        mean=metadata.mean,
        std=metadata.std,
        crop_pct=metadata.crop_pct,
        crop_mode=metadata.crop_mode,
    )
    shorter = round(min(metadata.input_size[1:]) / metadata.crop_pct)
    found = [image.path for image in list_images(folder).images]
    if not found:
        raise ValueError(f"the folder {folder} has no image files to calibrate on, such as .jpg or .png")
    count = min(most, len(found))
    images: list[Tensor] = []
    for number in range(count):
        path = found[number * len(found) // count]
        image = read_image(partial(_open, path), path, ImageLimits(max_pixels, shorter))
        seen = image if isinstance(image, Unreadable) else transformed(image, transform, path)
        if isinstance(seen, Unreadable):
            raise ValueError(f"{seen.path}, to calibrate on, cannot be read: {seen.reason}")
        images.append(seen)
    return torch.stack(images)


def _open(path: str) -> IO[bytes]:
    return open(path, "rb")


def quantized(model: Any, images: Tensor) -> Any:
    """Return an ONNX model in int8: weights of products and of convolutions, and what they are multiplied by.

    Weights have a scale for each output channel. Products of two activations, which attention consists of,
    stay in float32, and so does what a product gives: rounding the queries, keys and scores too would change
    which patches are kept, and none of it would be faster.

    Args:
        model: ONNX, float32, of one input.
        images: float32 [n, C, height, width], to calibrate on: the range of each activation is that which it
            has on these.

    Raises:
        ValueError: there is nothing to quantise, or the quantizer fails; the message is its reason.
    """
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    (name,) = (value.name for value in model.graph.input)
    constants = {value.name for value in model.graph.initializer}
    products = [
        node.name for node in model.graph.node if node.op_type in _QUANTISED and node.input[1] in constants
    ]
    if not products:
        raise ValueError("the model has no product with weights that could be quantised")

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self._batches = iter(images.split(_AT_ONCE))

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self._batches, None)
            return None if batch is None else {name: batch.numpy()}

    with tempfile.TemporaryDirectory() as folder, refusing("ONNX Runtime's quantizer"), _quiet():
        file = Path(folder) / "int8.onnx"
        quantize_static(
            model,
            str(file),
            Reader(),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(_QUANTISED),
            nodes_to_quantize=products,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            extra_options={"OpTypesToExcludeOutputQuantization": list(_QUANTISED)},
        )
        return onnx.load(str(file))


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what the quantizer logs of its own workings to itself; it logs to the root."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
