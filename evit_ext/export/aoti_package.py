"""AOTInductor packages: compiled for one kind of machine, with calls of this package's operators."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch._inductor
from torch import Tensor

from evit_ext.export.metadata import KEY, Metadata
from evit_ext.export.program import refusing


def write_aoti(
    program: torch.export.ExportedProgram, path: Path, metadata: Metadata
) -> Callable[[Tensor], Tensor]:
    """Write an AOTInductor package, and return what runs it."""
    with torch.no_grad(), refusing("AOTInductor"):
        torch._inductor.aoti_compile_and_package(
            program,
            package_path=str(path),
            inductor_configs={"aot_inductor.metadata": {KEY: metadata.to_json(), **metadata.to_strings()}},
        )
    loaded = torch._inductor.aoti_load_package(str(path))
    return lambda images: loaded(images)
