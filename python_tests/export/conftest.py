"""What the tests of exported models share."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
from cmake_project import ROOT, run_cmake


@pytest.fixture(scope="session")
def onnx() -> ModuleType:
    """The package onnx; skips, with the reason, where something that ONNX needs is missing."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: pip install 'evit_ext[export]'")
    import onnx

    return onnx


@pytest.fixture(scope="session")
def openvino(onnx: ModuleType) -> ModuleType:
    """The package openvino; skips, with the reason, where something that it needs is missing."""
    if importlib.util.find_spec("openvino") is None:
        pytest.skip("openvino is not installed: pip install 'evit_ext[openvino]'")
    import openvino

    return openvino


@pytest.fixture(scope="session")
def cmake_package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which CMake has installed what it builds, and that was moved since."""
    build = ROOT / "build" / "cmake"
    cache = build / "CMakeCache.txt"
    usual = ("EVIT_LIBRARY:BOOL=ON\n", "EVIT_SANITIZE:STRING=\n")
    if not cache.is_file() or not all(line in cache.read_text() for line in usual):
        build = tmp_path_factory.mktemp("build")
        run_cmake("-S", ROOT, "-B", build, "-G", "Ninja", "-DEVIT_TESTS=OFF")
    # Also where `make test-cpp` has built it before: it may have changed since.
    run_cmake("--build", build, "--target", "evit", "evit_kernels")
    folder = tmp_path_factory.mktemp("packages")
    run_cmake("--install", build, "--prefix", folder / "installed")
    return (folder / "installed").rename(folder / "moved")
