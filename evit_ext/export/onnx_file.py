"""ONNX files in standard operators only."""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evit_ext.export.metadata import KEY, Metadata
from evit_ext.export.program import refusing
from evit_ext.export.standard_operators import decompositions

#: The version of the operators where none is asked for.
OPSET = 20

#: A file of the format holds no more.
_LARGEST = 2**31 - 2**20


def check_opset(opset: int) -> None:
    """Raise ValueError if there is no form of this version of ONNX's operators."""
    if opset < 18:
        raise ValueError(f"opset must be at least 18, got {opset}")


def write_onnx(model: Any, path: Path, metadata: Metadata) -> None:
    """Write an ONNX model with what is to be said of it, in the place of what it says of itself."""
    import onnx

    del model.metadata_props[:]
    entry = model.metadata_props.add()
    entry.key, entry.value = KEY, metadata.to_json()
    with refusing("onnx.checker"):
        onnx.checker.check_model(model, full_check=True)
    onnx.save(model, str(path))


def onnx_model(program: torch.export.ExportedProgram, opset: int = OPSET) -> Any:
    """Return a program as an ONNX model of standard operators, with images [B, …] and logits [B, …].

    Raises:
        ValueError: there is no such form, or it is too large; the message is the reason.
    """
    size = sum(value.numel() * value.element_size() for value in program.state_dict.values())
    if size > _LARGEST:
        raise ValueError(f"the model's weights take {size / 2**30:.1f} GiB; a file of ONNX holds less than 2")
    model = _converted(program, opset)
    _check_operators(model)
    _tidy(model)
    return model


def _converted(program: torch.export.ExportedProgram, opset: int) -> Any:
    """Return the ONNX model of a program."""
    with torch.no_grad(), refusing("torch.onnx"), _quiet():
        program = program.run_decompositions(decompositions())
        left = sorted({str(n.target) for n in program.graph.nodes if str(n.target).startswith("evit.")})
        if left:
            raise ValueError(f"{', '.join(left)} has no form in standard operators")
        exported = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=opset,
            input_names=["images"],
            output_names=["logits"],
            custom_translation_table={torch.ops.aten.sort.stable: _sort},
            verbose=False,
        )
    assert exported is not None
    return exported.model_proto


def _sort(self: Any, stable: bool | None = None, dim: int = -1, descending: bool = False) -> Any:
    """Return a stable sort, for which torch.onnx has nothing, as ONNX's TopK of all: stable by definition."""
    import onnxscript

    op: Any = onnxscript.opset18
    size = self.shape[dim]
    if not isinstance(size, int):
        raise ValueError("the number of tokens is not constant")
    return op.TopK(self, op.Constant(value_ints=[size]), axis=dim, largest=int(descending), sorted=1)


def operators(model: Any) -> Counter[str]:
    """Return how often each operator is in an ONNX model; those of other domains as domain::name."""
    return Counter(
        f"{node.domain}::{node.op_type}" if node.domain not in ("", "ai.onnx") else node.op_type
        for node in model.graph.node
    )


def _check_operators(model: Any) -> None:
    """Raise ValueError where a model needs more than standard operators, or scatters."""
    found = operators(model)
    wrong = sorted(name for name in found if "::" in name or name.startswith("Scatter"))
    if wrong or model.functions:
        wrong += sorted(function.name for function in model.functions)
        raise ValueError(f"the model cannot be exported: its ONNX graph would need {', '.join(wrong)}")


def _tidy(model: Any) -> None:
    """Give the batch its name, and take away where in the source code each operator came from."""
    graph = model.graph
    symbol = graph.input[0].type.tensor_type.shape.dim[0].dim_param
    for value in (*graph.input, *graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param == symbol:
                dim.dim_param = "batch"
    del graph.value_info[:]  # which names the batch, too; every runtime infers it again
    for part in (*graph.node, *graph.input, *graph.output, *graph.initializer, graph, model):
        part.doc_string = ""
        del part.metadata_props[:]


def runner(file: Path | bytes, threads: int = 0) -> Callable[[Tensor], Tensor]:
    """Return what runs an ONNX file, or its contents, in ONNX Runtime on the CPU.

    Its threads spin while they wait for each other, which is fast, and stop when a call ends: otherwise they
    would hold up what comes next. It runs batches of any size: told of one, it is not faster in float32, and
    makes Gemm of the linear layers, for which it has no kernel of int8.

    Args:
        file: as of :func:`evit_ext.export.export_model`, with one input and one output.
        threads: 0 is ONNX Runtime's own choice.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.force_spinning_stop", "1")
    contents = str(file) if isinstance(file, Path) else file
    with refusing("ONNX Runtime", "the file cannot be loaded"):
        session = onnxruntime.InferenceSession(contents, options, providers=["CPUExecutionProvider"])
    (name,) = (value.name for value in session.get_inputs())

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {name: images.numpy()})[0])

    return run


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what torch.onnx and onnxscript say of their own workings to themselves."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
