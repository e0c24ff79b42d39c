"""Engines: what runs a model on the CPU besides PyTorch as it is, and in which precisions each does."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from evit_ext._util.choices import ENGINES
from evit_ext._util.messages import shown
from evit_ext._util.spelling import nearest
from evit_ext.export.exporting import export_model
from evit_ext.export.metadata import read_metadata
from evit_ext.export.packages import require

#: Those that run files.
FILE_ENGINES = ("onnxruntime", "openvino")

#: What a precision may be called.
PRECISIONS = ("float32", "bfloat16", "float16", "int8")


def check_engine(engine: str) -> None:
    """Raise an error, with the way out, unless there is such an engine and its packages are installed.

    Raises:
        ValueError: there is none of that name.
        RuntimeError: a package is missing.
    """
    if engine not in ENGINES:
        near = nearest(engine, ENGINES)
        hint = f"the nearest is {near}" if near else f"expected one of {', '.join(ENGINES)}"
        raise ValueError(f"there is no engine {shown(engine)}: {hint}")
    if engine in FILE_ENGINES:
        require(engine, "onnx", "onnxscript")


def why_not(engine: str, precision: str) -> str | None:
    """Return why an engine does not compute in a precision on this machine, or None if it does.

    Args:
        engine: one of :data:`evit_ext.export.ENGINES`.
        precision: one of "float32", "bfloat16", "float16" and "int8".

    Raises:
        ValueError: there is no such engine or precision.
        RuntimeError: a package that the engine needs is missing.
    """
    check_engine(engine)
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {shown(precision)}")
    if engine not in FILE_ENGINES:
        return (
            "int8 is for exported files, which onnxruntime and openvino run" if precision == "int8" else None
        )
    if engine == "onnxruntime":
        if precision in ("float32", "int8"):
            return None
        return "its CPU provider lacks kernels that these models need, convolution first among them"
    from evit_ext.export.openvino_file import precisions

    return (
        None if precision in precisions() else "the processor has no instructions for it that OpenVINO uses"
    )


def load(
    file: str | os.PathLike[str],
    engine: str,
    precision: str | None = None,
    threads: int = 0,
    batch: int | None = None,
) -> Callable[[Tensor], Tensor]:
    """Load an exported file into an engine, and return what runs it.

    Args:
        file: of :func:`export_model`: ONNX for "onnxruntime"; ONNX or OpenVINO's .xml for "openvino".
        engine: "onnxruntime" or "openvino".
        precision: of what is computed: "float32", in OpenVINO also "bfloat16" and "float16" where the
            processor has them. None is float32. Files of int8 compute in it, and all else in this; "int8"
            takes no other files, and computes the rest in float32.
        threads: 0 is the engine's own choice.
        batch: the number of images in each call, for which OpenVINO prepares itself; None for any. ONNX
            Runtime takes any all the same, and would not be faster.

    Returns:
        A function from float32 images [B, channels, height, width] to float32 logits [B, classes], for one
        thread at a time.

    Raises:
        ValueError: there is no such engine, it does not compute in `precision` here, the file has other
            weights than that asks for, or cannot be read.
        FileNotFoundError: there is no such file.
        RuntimeError: a package that the engine needs is missing.
    """
    path = Path(file)
    check_engine(engine)
    if engine not in FILE_ENGINES:
        raise ValueError(f"files are run by {' and '.join(FILE_ENGINES)}, got engine {engine}")
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}")
    precision = precision or "float32"
    reason = why_not(engine, precision)
    if reason is not None:
        raise ValueError(f"{engine} does not compute in {precision} here: {reason}")
    if precision == "int8" and read_metadata(path).quantization != "int8":
        raise ValueError(f"{path} is not a file of int8: export one with --int8, or calibration=")
    if engine == "openvino":
        from evit_ext.export import openvino_file

        return openvino_file.runner(path, precision, threads, batch)
    from evit_ext.export import onnx_file

    if path.suffix == ".xml":
        raise ValueError(f"{path} is OpenVINO's, and onnxruntime runs ONNX: export it with --format onnx")
    return onnx_file.runner(path, threads)


def compiled(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return a model under torch.compile, with its weights as constants in the layout that products want.

    Without gradients only; weights that change later are not seen. What is between the operators is C++ as
    well, which counts at batch 1.
    """
    run: Callable[[Tensor], Tensor] = torch.compile(model, options={"freezing": True, "cpp_wrapper": True})
    return run


class EngineModel(nn.Module):
    """A model whose logits an engine computes; stages, settings and parameters are the model's own.

    Args:
        model: in eval mode.
        run: from images [B, channels, height, width] to logits [B, classes].
    """

    def __init__(self, model: nn.Module, run: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.module = model
        self._run = run

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [B, classes]."""
        return self._run(images)


@contextmanager
def in_engine(
    model: nn.Module, engine: str, precision: str = "float32", file: str | os.PathLike[str] | None = None
) -> Iterator[EngineModel]:
    """Provide a model as an engine runs it, for images of the model's size and batches of any.

    Args:
        model: in eval mode; float32 and on the CPU for engines that run files.
        engine: one of :data:`evit_ext.export.ENGINES`.
        precision: of engines that run files; of the others, it is that of the model and of autocast.
        file: an exported file of the model, which is run instead of a new one.

    Raises:
        ValueError, RuntimeError, OSError: as :func:`load` and :func:`export_model`.
    """
    check_engine(engine)
    threads = torch.get_num_threads()
    if engine not in FILE_ENGINES:
        yield EngineModel(model, compiled(model) if engine == "torch-compile" else model)
    elif file is not None:
        yield EngineModel(model, load(file, engine, precision, threads))
    elif precision == "int8":
        raise ValueError("int8 needs a file of int8, exported with --int8, or calibration=")
    else:
        with tempfile.TemporaryDirectory() as folder:
            exported = export_model(model, Path(folder) / "model.onnx", "onnx")
            yield EngineModel(model, load(exported.file, engine, precision, threads))
