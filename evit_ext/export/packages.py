"""The packages that formats and engines need, and how to get those that are missing."""

from __future__ import annotations

import importlib.util

#: Who needs them, for people, and the extra of this package that brings them.
_NEEDED_BY = {"openvino": ("OpenVINO", "openvino")}


def require(*packages: str) -> None:
    """Raise RuntimeError, with the way out, where one of the packages is not installed."""
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        what, extra = _NEEDED_BY.get(packages[0], ("ONNX", "export"))
        raise RuntimeError(
            f"{what} needs the package {missing[0]}, which is not installed: pip install 'evit_ext[{extra}]'"
        )
