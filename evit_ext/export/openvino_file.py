"""OpenVINO's own files: the graph in an .xml file, the weights in a .bin file beside it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evit_ext._util.messages import shown
from evit_ext.export.metadata import KEY, Metadata
from evit_ext.export.program import refusing

#: OpenVINO's names of what it computes in. Files of int8 compute all else in float32.
_HINTS = {"float32": "f32", "bfloat16": "bf16", "float16": "f16", "int8": "f32"}


#: Two threads must not make two.
_making_core = threading.Lock()


def core() -> Any:
    """Return OpenVINO's core: one that lasts as long as the process.

    Each core gives the thread that makes it a stack for signals, and puts back the one before in the end. Of
    two cores whose lives overlap, that may be gone by then, and the next signal with a handler ends the
    process (seen in OpenVINO 2026.4).
    """
    with _making_core:
        return _core()


@cache
def _core() -> Any:
    import openvino

    return openvino.Core()


def write_openvino(onnx: Any, path: Path, metadata: Metadata) -> None:
    """Write an ONNX model as OpenVINO's files: `path`, which ends in .xml, and a .bin of the same stem.

    Weights stay as they are; OpenVINO's own default rounds them to float16.
    """
    import openvino

    with refusing("OpenVINO"):
        model = core().read_model(onnx.SerializeToString())
        model.set_rt_info(metadata.to_json(), KEY)
        openvino.save_model(model, str(path), compress_to_fp16=False)


def precisions() -> tuple[str, ...]:
    """Return the precisions that OpenVINO computes in on this processor."""
    able = core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    names = {"float32": "FP32", "bfloat16": "BF16", "float16": "FP16", "int8": "INT8"}
    return tuple(name for name, capability in names.items() if capability in able)


def runner(
    file: Path | bytes, precision: str = "float32", threads: int = 0, batch: int | None = None
) -> Callable[[Tensor], Tensor]:
    """Return what runs a file in OpenVINO on the CPU.

    Left to itself, OpenVINO computes in bfloat16 where the processor has it; here it computes in what it is
    asked for.

    Args:
        file: OpenVINO's or ONNX, as of :func:`evit_ext.export.export_model`; or the contents of an ONNX file.
        precision: "float32", "bfloat16" or "float16"; "int8" for files of int8, whose other operators
            compute in float32. Images and logits are float32 in any case.
        threads: 0 is OpenVINO's own choice.
        batch: the number of images in each call, for which it prepares itself; None for any.

    Raises:
        ValueError: it cannot read the file, or not compute in `precision` on this processor.
    """
    if precision not in _HINTS:
        raise ValueError(f"precision must be one of {', '.join(_HINTS)}, got {shown(precision)}")
    hint = _HINTS[precision]
    settings: dict[str, object] = {"INFERENCE_PRECISION_HINT": hint, "PERFORMANCE_HINT": "LATENCY"}
    if threads:
        settings["INFERENCE_NUM_THREADS"] = threads
    with refusing("OpenVINO", "the file cannot be loaded"):
        model = core().read_model(str(file) if isinstance(file, Path) else file)
        if batch is not None:
            _, *shape = model.input().get_partial_shape()
            model.reshape([batch, *shape])
        compiled = core().compile_model(model, "CPU", settings)
        used = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    if used != hint:
        raise ValueError(f"OpenVINO does not compute in {precision} on this processor, but in {used}")
    request = compiled.create_infer_request()

    def run(images: Tensor) -> Tensor:
        found = request.infer([images.contiguous().numpy()], share_inputs=True)
        return torch.from_numpy(found[0])

    return run
