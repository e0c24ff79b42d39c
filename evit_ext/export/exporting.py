"""Exporting a model: to a file of one of four formats, compared with the model before it has its name."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from evit_ext._util.files import private_folder, put
from evit_ext._util.messages import shown
from evit_ext.export.comparison import TOLERANCES, Agreement, agreement, clear_images, compare
from evit_ext.export.metadata import FILE, Metadata, describe
from evit_ext.export.packages import require
from evit_ext.export.program import capture, check_exportable

#: What may be written, by its name, and how the files' names end.
FORMATS = {"pt2": ".pt2", "onnx": ".onnx", "openvino": ".xml", "aoti": ".pt2"}

#: The formats that are made of a model's ONNX form, for people.
_OF_ONNX = {"onnx": "ONNX", "openvino": "OpenVINO's format"}

#: What is known by the ending of its name.
_ENDINGS = {"aoti": "an AOTInductor package", "openvino": "OpenVINO's file of the graph"}


@dataclass(frozen=True)
class Exported:
    """What :func:`export_model` wrote.

    Attributes:
        file: its path.
        files: all that was written: `file`, and OpenVINO's weights beside it.
        format: one of :data:`FORMATS`.
        metadata: what the file says about the model.
        batches: sizes of the batches that were compared.
        max_difference: the largest difference between a logit of the file and of the model.
        agreement: how a file of int8 compares with the model; None for others.
    """

    file: Path
    files: tuple[Path, ...]
    format: str
    metadata: Metadata
    batches: tuple[int, ...]
    max_difference: float
    agreement: Agreement | None = None


def export_model(
    model: nn.Module,
    file: str | os.PathLike[str],
    format: str = "pt2",
    *,
    name: str | None = None,
    image_size: int | tuple[int, int] | None = None,
    classes: Sequence[str] | None = None,
    crop_pct: float | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    max_batch: int | None = None,
    opset: int = 20,
    calibration: Tensor | str | os.PathLike[str] | None = None,
    max_calibration_images: int = 128,
) -> Exported:
    """Write `model` to a file for batches of any size, and check that the file computes the same.

    The keep rate is fixed in the file: K is a constant of each stage.

    Args:
        model: any module in eval mode that takes images [B, channels, height, width] and returns one tensor,
            such as an EViT or a DynamicViT. It is not changed.
        file: an existing file is replaced once the new one has been written and checked.
        format: "pt2", a torch.export program with this package's operators; "onnx", standard operators only,
            checked in ONNX Runtime, for float32 models on the CPU; "openvino", the same as OpenVINO's two
            files, `file` and one of weights beside it, which ends in .bin, checked in OpenVINO; "aoti",
            compiled by AOTInductor for this kind of machine, with this package's operators.
        name: of the model, for :class:`Metadata`; by default the name of its class.
        image_size: height and width, or one number for both; None for the model's own.
        classes: names of the logits.
        crop_pct, mean, std: for :class:`Metadata`; None for the model's own.
        max_batch: the largest batch, at least 2; None for no limit.
        opset: version of ONNX's operators, at least 18.
        calibration: images like those that the model will see, for "onnx" and "openvino": the file is then of
            int8, and is compared with the model on one in four of them, which do not calibrate it. A folder
            of images, however deep, or float32 [n, channels, height, width] as the model takes them; at least
            4.
        max_calibration_images: how many of a folder are read at most.

    Raises:
        TypeError: `model` is no module.
        ValueError: the model cannot be exported (the message says why), the file does not compute what the
            model does, or an argument is out of range. An existing `file` stays as it was.
        RuntimeError: packages for ONNX or OpenVINO are missing, or no C++ compiler is found for AOTInductor.
        OSError: the file cannot be written.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch module, got {type(model).__name__}")
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {shown(format)}")
    if format in _ENDINGS and Path(file).suffix != FORMATS[format]:
        raise ValueError(f"{_ENDINGS[format]} must have a name that ends in {FORMATS[format]}, got {file}")
    path = Path(file)
    _check_place(path)
    if format == "openvino":
        _check_place(path.with_suffix(".bin"))
    if max_batch is not None and max_batch < 2:
        raise ValueError(f"max_batch must be at least 2, got {max_batch}")
    _check_format(format, opset, calibration is not None)
    if calibration is not None and max_calibration_images < 4:
        raise ValueError(f"max_calibration_images must be at least 4, got {max_calibration_images}")
    weight = next(model.parameters(), torch.zeros(()))
    if weight.dtype not in TOLERANCES:
        raise ValueError(f"a model in {weight.dtype} cannot be exported")
    if format in _OF_ONNX and (weight.dtype != torch.float32 or weight.device.type != "cpu"):
        raise ValueError(
            f"{_OF_ONNX[format]} is written of a model in float32 on the CPU, where it is compared; this one "
            f"is in {weight.dtype} on {weight.device.type}: model.float().cpu()"
        )
    quantization = None if calibration is None else "int8"
    metadata = describe(
        model,
        name or type(model).__name__,
        image_size,
        classes,
        crop_pct,
        mean,
        std,
        max_batch,
        quantization,
    )
    # Read before anything else is computed, as they may be missing.
    calibrating, others = _calibration(calibration, metadata, max_calibration_images)
    # With a generator of its own, as what is random elsewhere should not depend on an export.
    images = torch.randn(2, *metadata.input_size, generator=torch.Generator().manual_seed(0)).to(weight)
    check_exportable(model, images)
    if metadata.classes is not None:
        _check_classes(metadata.classes, model, images)
    batches = clear_images(model, images, (1, 3 if max_batch is None else min(max_batch, 3)))
    program = capture(model, images, max_batch)
    found = None
    with private_folder(path.parent, path.name) as folder:
        run = _writer(format, opset, calibrating)(program, folder / path.name, metadata)
        if calibrating is None or others is None:
            difference = compare(model, run, batches)
        else:
            found, difference = agreement(model, run, others, len(calibrating))
        files = _put_all(folder, path)
    sizes = tuple(len(batch) for batch in batches)
    return Exported(path, files, format, metadata, sizes, difference, found)


#: Writes a program to a file that is not there, and returns what runs the file.
Writer = Callable[[torch.export.ExportedProgram, Path, Metadata], Callable[[Tensor], Tensor]]


def _writer(format: str, opset: int, calibration: Tensor | None) -> Writer:
    if format == "pt2":
        return write_pt2
    # Here, as what they need may be missing, and takes a while to import.
    if format == "aoti":
        from evit_ext.export.aoti_package import write_aoti

        return write_aoti
    from evit_ext.export import onnx_file, openvino_file

    to_file, runner = (
        (onnx_file.write_onnx, onnx_file.runner)
        if format == "onnx"
        else (openvino_file.write_openvino, openvino_file.runner)
    )

    def write(
        program: torch.export.ExportedProgram, path: Path, metadata: Metadata
    ) -> Callable[[Tensor], Tensor]:
        model = onnx_file.onnx_model(program, opset)
        if calibration is not None:
            from evit_ext.export.int8 import quantized

            model = quantized(model, calibration)
        to_file(model, path, metadata)
        return runner(path)

    return write


def write_pt2(
    program: torch.export.ExportedProgram, path: Path, metadata: Metadata
) -> Callable[[Tensor], Tensor]:
    """Write a torch.export archive, and return the program that it holds."""
    # A file and not a path, of which torch wants to choose the name.
    with path.open("wb") as file:
        torch.export.save(program, file, extra_files={FILE: metadata.to_json()})
    loaded = torch.export.load(path).module()
    return lambda images: loaded(images)


def _put_all(folder: Path, path: Path) -> tuple[Path, ...]:
    """Have the file of `path`'s name in `folder`, and what else is there, take their places; return these."""
    others = [file for file in folder.iterdir() if file.name != path.name]
    if others:
        # A kill at the wrong moment then leaves no graph, and not one with the weights of another model.
        path.unlink(missing_ok=True)
    for file in (*others, folder / path.name):
        put(file, path.with_name(file.name))
    return (path, *(path.with_name(file.name) for file in others))


def _check_format(format: str, opset: int, is_int8: bool) -> None:
    """Raise an error where a format cannot be written, before anything is computed."""
    if format not in _OF_ONNX:
        if is_int8:
            raise ValueError(f"int8 is for the formats onnx and openvino, got {format}")
        return
    from evit_ext.export.onnx_file import check_opset

    check_opset(opset)
    require(*(["openvino"] if format == "openvino" else []), "onnx", "onnxscript", "onnxruntime")


def _calibration(
    given: Tensor | str | os.PathLike[str] | None, metadata: Metadata, most: int
) -> tuple[Tensor | None, Tensor | None]:
    """Return the images to calibrate on, and those to compare on; None for a file that is not of int8."""
    if given is None:
        return None, None
    from evit_ext.export.int8 import read_images, split

    if not isinstance(given, Tensor):
        given = read_images(Path(given), metadata, most)
    if tuple(given.shape[1:]) != metadata.input_size or given.dtype != torch.float32:
        raise ValueError(
            f"calibration must be float32 [n, {', '.join(map(str, metadata.input_size))}], got {given.dtype} "
            f"{tuple(given.shape)}"
        )
    return split(given.detach().cpu())


def _check_place(path: Path) -> None:
    """Raise OSError where no file `path` can be written, before anything is computed."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {path.parent} to write {path.name} to")
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, expected a file")


@torch.no_grad()
def _check_classes(classes: Sequence[str], model: nn.Module, images: Tensor) -> None:
    logits = model(images[:1]).shape[-1]
    if len(classes) != logits:
        raise ValueError(f"the model has {logits} logits, got names of {len(classes)} classes")
