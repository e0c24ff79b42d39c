"""Exporting a model: to a file of one of three formats, compared with the model before it has its name."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from evit_ext._util.files import replacing_path
from evit_ext._util.messages import shown
from evit_ext.export.comparison import TOLERANCES, clear_images, compare
from evit_ext.export.metadata import FILE, Metadata, describe
from evit_ext.export.program import capture, check_exportable

#: What may be written, by its name, and how the files' names end.
FORMATS = {"pt2": ".pt2", "onnx": ".onnx", "aoti": ".pt2"}


@dataclass(frozen=True)
class Exported:
    """What :func:`export_model` wrote.

    Attributes:
        file: its path.
        format: one of :data:`FORMATS`.
        metadata: what the file says about the model.
        batches: sizes of the batches that were compared.
        max_difference: the largest difference between a logit of the file and of the model.
    """

    file: Path
    format: str
    metadata: Metadata
    batches: tuple[int, ...]
    max_difference: float


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
) -> Exported:
    """Write `model` to a file for batches of any size, and check that the file computes the same.

    The keep rate is fixed in the file: K is a constant of each stage.

    Args:
        model: any module in eval mode that takes images [B, channels, height, width] and returns one tensor,
            such as an EViT or a DynamicViT. It is not changed.
        file: an existing file is replaced once the new one has been written and checked.
        format: "pt2", a torch.export program with this package's operators; "onnx", standard operators only,
            checked in ONNX Runtime, for float32 models on the CPU; "aoti", compiled by AOTInductor for this
            kind of machine, with this package's operators.
        name: of the model, for :class:`Metadata`; by default the name of its class.
        image_size: height and width, or one number for both; None for the model's own.
        classes: names of the logits.
        crop_pct, mean, std: for :class:`Metadata`; None for the model's own.
        max_batch: the largest batch, at least 2; None for no limit.
        opset: version of ONNX's operators, at least 18.

    Raises:
        TypeError: `model` is no module.
        ValueError: the model cannot be exported (the message says why), the file does not compute what the
            model does, or an argument is out of range. An existing `file` stays as it was.
        RuntimeError: packages for ONNX are missing, or no C++ compiler is found for AOTInductor.
        OSError: the file cannot be written.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch module, got {type(model).__name__}")
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {shown(format)}")
    if format == "aoti" and Path(file).suffix != ".pt2":
        raise ValueError(f"an AOTInductor package must have a name that ends in .pt2, got {file}")
    path = Path(file)
    _check_place(path)
    if max_batch is not None and max_batch < 2:
        raise ValueError(f"max_batch must be at least 2, got {max_batch}")
    write = _writer(format, opset)
    weight = next(model.parameters(), torch.zeros(()))
    if weight.dtype not in TOLERANCES:
        raise ValueError(f"a model in {weight.dtype} cannot be exported")
    if format == "onnx" and (weight.dtype != torch.float32 or weight.device.type != "cpu"):
        raise ValueError(
            f"ONNX is written of a model in float32 on the CPU, where it is compared; this one is in "
            f"{weight.dtype} on {weight.device.type}: model.float().cpu()"
        )
    metadata = describe(
        model, name or type(model).__name__, image_size, classes, crop_pct, mean, std, max_batch
    )
    # With a generator of its own, as what is random elsewhere should not depend on an export.
    images = torch.randn(2, *metadata.input_size, generator=torch.Generator().manual_seed(0)).to(weight)
    check_exportable(model, images)
    if metadata.classes is not None:
        _check_classes(metadata.classes, model, images)
    batches = clear_images(model, images, (1, 3 if max_batch is None else min(max_batch, 3)))
    program = capture(model, images, max_batch)
    with replacing_path(path) as unfinished:
        run = write(program, unfinished, metadata)
        difference = compare(model, run, batches)
    return Exported(path, format, metadata, tuple(len(batch) for batch in batches), difference)


#: Writes a program to a file that is not there, and returns what runs the file.
Writer = Callable[[torch.export.ExportedProgram, Path, Metadata], Callable[[Tensor], Tensor]]


def _writer(format: str, opset: int) -> Writer:
    if format == "pt2":
        return write_pt2
    # Here, as their packages may be missing, and take a while to import.
    if format == "onnx":
        from evit_ext.export.onnx_file import onnx_writer

        return onnx_writer(opset)
    from evit_ext.export.aoti_package import write_aoti

    return write_aoti


def write_pt2(
    program: torch.export.ExportedProgram, path: Path, metadata: Metadata
) -> Callable[[Tensor], Tensor]:
    """Write a torch.export archive, and return the program that it holds."""
    # A file and not a path, of which torch wants to choose the name.
    with path.open("wb") as file:
        torch.export.save(program, file, extra_files={FILE: metadata.to_json()})
    loaded = torch.export.load(path).module()
    return lambda images: loaded(images)


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
