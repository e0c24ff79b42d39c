"""What the tests of exported models share."""

from __future__ import annotations

import importlib.util
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def onnx() -> ModuleType:
    """The package onnx; skips, with the reason, where something that ONNX needs is missing."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: pip install 'evit_ext[export]'")
    import onnx

    return onnx
