"""Models exported to ONNX and run by ONNX Runtime on the CPU: what a deployer without PyTorch would have.

float32 only: of bfloat16, ONNX Runtime's CPU provider lacks kernels that these models need, the first of them
convolution (tried with 1.31). Only models in plain PyTorch operators: ONNX knows nothing of this package's.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from evit_ext.export.onnx_file import runner

#: The first one whose operators include attention; ONNX Runtime was not faster with the exporter's default.
OPSET = 23


def available() -> bool:
    """Return whether the packages are installed; say how to get them, if not."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        print(
            f"ONNX Runtime is left out, because {error.name} is not installed: pip install 'evit_ext[bench]'"
            ", or pip install onnxruntime onnx onnxscript"
        )
        return False
    return True


def version() -> str:
    """Return ONNX Runtime's version."""
    import onnxruntime

    return str(onnxruntime.__version__)


class OnnxModel(nn.Module):
    """A model run by ONNX Runtime, with as many threads as torch has when it is made.

    Args:
        model: in eval mode, on the CPU, in float32; from images to logits. It is not kept.
        images: [B, 3, height, width], what it will be run on: the exported model is for this shape only,
            which is what ONNX Runtime can optimise best.
    """

    def __init__(self, model: nn.Module, images: Tensor) -> None:
        super().__init__()
        self._exported = _exported(model, images)
        self._run = runner(self._exported, torch.get_num_threads())

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [B, classes]."""
        return self._run(images)

    def __getstate__(self) -> dict[str, Any]:
        # What runs it cannot be pickled, but made again.
        return {name: value for name, value in self.__dict__.items() if name != "_run"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._run = runner(self._exported, torch.get_num_threads())


def _exported(model: nn.Module, images: Tensor) -> bytes:
    with torch.no_grad(), _quiet():
        program = torch.onnx.export(
            model,
            (images,),
            dynamo=True,
            verbose=False,
            opset_version=OPSET,
            custom_translation_table={torch.ops.aten.sort.stable: _stable_sort()},
        )
    assert program is not None
    return bytes(program.model_proto.SerializeToString())


def _stable_sort() -> Callable[..., Any]:
    """Return torch.sort(stable=True) in ONNX, which the exporter has no translation of.

    TopK of all entries is one: of equal entries ONNX has the one of the lower index first.
    """
    from onnxscript import opset18 as onnx

    def sort(self: Any, stable: bool | None = None, dim: int = -1, descending: bool = False) -> Any:
        numbers = onnx.Cast(self, to=6)  # int32: TopK takes no booleans, which is what is sorted here
        length = onnx.Gather(onnx.Shape(numbers), onnx.Constant(value_ints=[dim]))
        return onnx.TopK(numbers, length, axis=dim, largest=int(descending), sorted=1)

    return sort


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's remarks to itself; errors are raised, not printed."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
