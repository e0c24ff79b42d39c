"""What nvcc makes of the CUDA sources, before ptxas: no GPU is needed, only a CUDA toolkit."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BUILD = json.loads((ROOT / "csrc" / "build.json").read_text())

pytestmark = pytest.mark.skipif(
    shutil.which("nvcc") is None, reason="no nvcc, which comes with a CUDA toolkit"
)


def fusible_products(ptx: str) -> list[str]:
    """Sums that ptxas may make a fused multiply-add: neither they nor a product in them name a rounding."""
    found, kernel = [], ""
    products: dict[str, str] = {}
    for line in ptx.splitlines():
        if entry := re.search(r"\.entry\s+(\w+)", line):
            kernel, products = entry[1], {}
        elif match := re.search(r"\b(mul|add|sub)\.f(?:32|64)\s+(%\w+), (\S+), (\S+);", line):
            operation, result, *operands = match.groups()
            if operation == "mul":
                products[result] = match[0]
            else:
                found += [f"{kernel}: {products[o]} {match[0]}" for o in operands if o in products]
    return found


def test_a_fusible_product_is_found() -> None:
    rounded = "mul.rn.f32 %f3, %f1, %f2;\n add.f32 %f4, %f3, %f1;\n fma.rn.f32 %f5, %f1, %f2, %f4;\n"
    plain = "mul.f32 %f3, %f1, %f2;\n @%p1 sub.f32 %f4, %f1, %f3;\n"
    assert fusible_products(f".visible .entry a(\n{rounded}") == []
    assert fusible_products(f".visible .entry a(\n{rounded}.visible .entry b(\n{plain}") == [
        "b: mul.f32 %f3, %f1, %f2; sub.f32 %f4, %f1, %f3;"
    ]
    # A register of another kernel is another register.
    assert fusible_products(f".entry a(\n{plain.splitlines()[0]}\n.entry b(\n add.f32 %f4, %f3, %f1;") == []


@pytest.mark.parametrize("source", BUILD["cuda_kernels"], ids=lambda source: Path(source).stem)
def test_the_compiler_has_no_choice_in_sums(source: str, tmp_path: Path) -> None:
    """ptxas fuses a product with the sum after it where it likes: in one kernel and not in its variant, or
    for one architecture. So every product that is added says what it is (device.cuh): multiply_add, or
    multiply and add."""
    ptx = tmp_path / "kernels.ptx"
    flags = [f"-std=c++{BUILD['cxx_standard']}", *BUILD["nvcc_flags"]]
    command = ["nvcc", *flags, "-arch=compute_90", "-ptx", str(ROOT / source), "-o", str(ptx)]
    subprocess.run(command, check=True, capture_output=True)
    assert fusible_products(ptx.read_text()) == []
