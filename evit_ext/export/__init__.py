"""Models as files that run without this package's Python: torch.export programs, ONNX, AOTInductor packages.

``evit export`` is the command, ``docs/export.md`` the guide. Every file is loaded again and compared with the
model before it takes its name.
"""

from evit_ext.export.exporting import FORMATS, Exported, export_model
from evit_ext.export.metadata import Metadata, read_metadata

__all__ = ["FORMATS", "Exported", "Metadata", "export_model", "read_metadata"]
