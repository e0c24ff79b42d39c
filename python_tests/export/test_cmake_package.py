"""The CMake package: find_package(evit) from another project, with LibTorch and without."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch
from cmake_project import ROOT, configure, run_cmake, write_project

import evit_ext

VERSION = ".".join(evit_ext.__version__.split(".")[:2])

LINK_KERNELS = f"""
find_package(evit {VERSION} REQUIRED COMPONENTS kernels)
add_executable(main main.cpp)
target_link_libraries(main PRIVATE evit::kernels)
if(TARGET evit::evit OR TARGET evit::libtorch)
  message(FATAL_ERROR "torch was looked for")
endif()
"""

#: x [1, 4, 2] with tokens 0 1, 2 3, 4 5, 6 7; of it 3 and 0.
USE_KERNELS = """
#include <evit/gather_tokens.h>
#include <cstdio>
int main() {
  const float x[] = {0, 1, 2, 3, 4, 5, 6, 7};
  const int64_t index[] = {3, 0};
  float out[4];
  evit::cpu::gather_tokens<float>({1, 4, 2, 2}, {x, 8, 2}, {index, 2, 1}, out, evit::serial_executor());
  std::printf("%g %g %g %g", out[0], out[1], out[2], out[3]);
}
"""

LINK_OPERATORS = f"""
find_package(evit {VERSION} REQUIRED)
add_executable(main main.cpp)
target_link_libraries(main PRIVATE evit::evit)
"""

#: Names nothing of libevit.
USE_OPERATORS = """
#include <ATen/core/dispatch/Dispatcher.h>
#include <cstdio>
int main() {
  const auto found = c10::Dispatcher::singleton().findSchema({"evit::class_attention", ""});
  std::printf("%s", found ? "registered" : "missing");
}
"""


def run(program: Path) -> str:
    done = subprocess.run([program], env={}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_names_no_folder_of_its_build(cmake_package: Path) -> None:
    files = [path for path in cmake_package.rglob("*") if path.is_file()]
    names = {path.name for path in files}
    assert {"libevit.so", "libevit_kernels.a", "class_attention.h"} <= names
    assert {"evitConfig.cmake", "evitConfigVersion.cmake", "evitLibTorch.cmake"} <= names
    folders = (ROOT, cmake_package.with_name("installed"), Path(torch.__file__).parent)
    for path in files:
        if path.suffix == ".cmake":
            assert not any(str(folder) in path.read_text() for folder in folders), path


def test_kernels(cmake_package: Path, tmp_path: Path) -> None:
    project = tmp_path / "kernels"
    write_project(project, LINK_KERNELS, USE_KERNELS)
    configured = configure(project, cmake_package)
    assert configured.returncode == 0, configured.stderr
    run_cmake("--build", project / "build")
    assert run(project / "build" / "main") == "6 7 0 1"


def test_operators(cmake_package: Path, tmp_path: Path) -> None:
    """Whoever links evit::evit has the operators, also where linkers drop what no symbol is named of."""
    project = tmp_path / "operators"
    write_project(project, LINK_OPERATORS, USE_OPERATORS)
    folders = f"{cmake_package};{torch.utils.cmake_prefix_path}"
    options = ("-DCMAKE_EXE_LINKER_FLAGS=-Wl,--as-needed", "-DPython3_EXECUTABLE=/nowhere/python3")
    configured = configure(project, folders, *options)
    assert configured.returncode == 0, configured.stderr
    run_cmake("--build", project / "build")
    assert run(project / "build" / "main") == "registered"


FOUND_BEFORE = """
add_library(torch INTERFACE IMPORTED)
set(TORCH_LIBRARIES torch a_library_beside_it)
{}
find_package(evit REQUIRED)
get_target_property(found evit::libtorch INTERFACE_LINK_LIBRARIES)
if(NOT "${{found}}" STREQUAL "${{TORCH_LIBRARIES}}")
  message(FATAL_ERROR "found: ${{found}}")
endif()
"""


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        (f'set(TORCH_INSTALL_PREFIX "{Path(torch.__file__).parent}")', "found before"),
        ("set(Torch_VERSION 2.10.1)", "(2.10.1), found before"),
        ("", "found before, its version is not known; evit needs 2.10 or newer"),
    ],
    ids=["by its headers", "by its package", "not known"],
)
def test_torch_that_was_found_before(cmake_package: Path, tmp_path: Path, setting: str, said: str) -> None:
    """Two LibTorchs in one program would be one too many."""
    write_project(tmp_path / "before", FOUND_BEFORE.format(setting), "")
    configured = configure(tmp_path / "before", cmake_package)
    assert configured.returncode == 0, configured.stderr
    assert said in configured.stdout


@pytest.mark.parametrize("header", ["headeronly/version.h", "csrc/api/include/torch/version.h", None])
def test_an_old_torch_that_was_found_before(cmake_package: Path, tmp_path: Path, header: str | None) -> None:
    folder = tmp_path / "torch"
    setting = f'set(TORCH_INSTALL_PREFIX "{folder}")\n'
    if header is None:
        setting += "set(Torch_VERSION 2.9.1)"
    else:
        file = folder / "include" / "torch" / header
        file.parent.mkdir(parents=True)
        parts = {"MAJOR": 2, "MINOR": 9, "PATCH": 1}
        file.write_text("".join(f"#define TORCH_VERSION_{name} {part}\n" for name, part in parts.items()))
    write_project(tmp_path / "before", FOUND_BEFORE.format(setting), "")
    configured = configure(tmp_path / "before", cmake_package)
    assert configured.returncode != 0
    said = " ".join(configured.stderr.split())
    assert f"torch 2.10 or newer, but find_package(Torch) found 2.9.1 in {folder} before" in said


@pytest.mark.parametrize(
    ("lists", "options", "message"),
    [
        ("find_package(evit REQUIRED COMPONENTS cuda)", [], "no component cuda, only: operators, kernels"),
        ("find_package(evit 99 REQUIRED)", [], 'requested version "99"'),
        ("find_package(evit REQUIRED)", ["-DEVIT_TORCH_ROOT=/nowhere"], "torch 2.10 or newer in /nowhere"),
        (
            "find_package(evit REQUIRED)",
            ["-DPython3_EXECUTABLE=/nowhere/python3"],
            "LibTorch was not found: set EVIT_TORCH_ROOT",
        ),
    ],
)
def test_errors(cmake_package: Path, tmp_path: Path, lists: str, options: list[str], message: str) -> None:
    write_project(tmp_path / "wrong", lists, "")
    configured = configure(tmp_path / "wrong", cmake_package, *options)
    assert configured.returncode != 0
    assert message in " ".join(configured.stderr.split())


def test_optional_component(cmake_package: Path, tmp_path: Path) -> None:
    lists = """
    find_package(evit REQUIRED COMPONENTS kernels OPTIONAL_COMPONENTS cuda)
    if(NOT evit_kernels_FOUND OR evit_cuda_FOUND)
      message(FATAL_ERROR "kernels: ${evit_kernels_FOUND}, cuda: ${evit_cuda_FOUND}")
    endif()
    """
    write_project(tmp_path / "optional", lists, "")
    configured = configure(tmp_path / "optional", cmake_package)
    assert configured.returncode == 0, configured.stderr
