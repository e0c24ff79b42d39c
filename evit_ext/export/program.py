"""A model as a torch.export program with a dynamic batch, and what cannot become one."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from evit_ext.tokens.stage import find_stages


def check_exportable(model: nn.Module, images: Tensor) -> None:
    """Raise ValueError, with the reason, where `model` of `images` cannot be exported.

    Args:
        model: any module.
        images: [B, channels, height, width], of the model's dtype and device.
    """
    name = type(model).__name__
    if hasattr(model, "_orig_mod"):
        raise ValueError("the model is compiled: pass the one inside (._orig_mod)")
    if model.training:
        raise ValueError(
            f"the {name} is in training mode, in which it computes something else: call model.eval() first"
        )
    for stage in find_stages(model):
        if stage.guidance is not None:
            raise ValueError(
                "an oracle guides the model, which is not part of it: export it after Oracle.guide's context"
            )
        if stage.rule.draws:
            raise ValueError(
                f"its rule {stage.rule.name} draws random numbers, so that no file can be compared with the "
                "model: apply another rule"
            )
        if stage.recorders:
            raise ValueError("its tokens are being recorded: export it after record_tokens' context")
    if any(value.is_meta for value in (*model.parameters(), *model.buffers())):
        raise ValueError("the model has no weights, but is on the meta device")
    with torch.no_grad():
        output = model(images)
    if not isinstance(output, Tensor):
        raise ValueError(
            f"the {name} returns a {type(output).__name__}, and what can be exported returns one tensor: "
            "wrap it in a module that does"
        )
    if not output.is_floating_point():
        raise ValueError(f"the {name} returns {output.dtype}, and only floating-point numbers are compared")
    if not output.isfinite().all():
        raise ValueError("the model gives NaN or infinity for random images, so that nothing can be compared")


def capture(model: nn.Module, images: Tensor, max_batch: int | None) -> torch.export.ExportedProgram:
    """Return the program of `model`, without gradients, for batches of 1 to `max_batch` images.

    Args:
        model: in eval mode.
        images: [B, channels, height, width] with B at least 2; only the shape matters.
        max_batch: None is any number.

    Raises:
        ValueError: torch.export cannot trace it; the message is its reason.
    """
    batch = torch.export.Dim("batch", min=1, max=max_batch)
    with torch.no_grad(), refusing("torch.export"), _quiet():
        program = torch.export.export(model, (images,), dynamic_shapes=({0: batch},))
    without_traces(program)
    return program


def without_traces(program: torch.export.ExportedProgram) -> None:
    """Take away where in the source code each step came from: names of folders of this machine."""
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)


@contextmanager
def refusing(exporter: str, what: str = "the model cannot be exported") -> Iterator[None]:
    """Raise a ValueError of one line where an exporter fails; each has errors of its own, of many lines."""
    try:
        yield
    except (OSError, MemoryError):
        raise
    except Exception as error:
        reason: BaseException = error
        while reason.__cause__ is not None:
            reason = reason.__cause__
        lines = [line.strip() for line in str(reason).splitlines() if line.strip()]
        said = lines[0] if lines else type(reason).__name__
        raise ValueError(f"{what}: {exporter} says: {said}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what torch.export logs of its own workings, errors included, which are raised as well."""
    logger = logging.getLogger("torch.export")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
