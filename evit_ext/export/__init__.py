"""Models as files that run without this package's Python: torch.export programs, ONNX, OpenVINO, AOTInductor.

``evit export`` is the command, ``docs/export.md`` the guide. Every file is loaded again and compared with the
model before it takes its name. :func:`load` runs ONNX's and OpenVINO's files on the CPU.
"""

from evit_ext._util.choices import ENGINES
from evit_ext.export.comparison import Agreement
from evit_ext.export.engines import load, why_not
from evit_ext.export.exporting import FORMATS, Exported, export_model
from evit_ext.export.metadata import Metadata, read_metadata

__all__ = [
    "ENGINES",
    "FORMATS",
    "Agreement",
    "Exported",
    "Metadata",
    "export_model",
    "load",
    "read_metadata",
    "why_not",
]
