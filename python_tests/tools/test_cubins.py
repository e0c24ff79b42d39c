"""What ptxas made of the CUDA kernels: read from the built module, so no GPU is needed."""

from __future__ import annotations

import importlib.util
import itertools
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from evit_ext import _C

#: The kernels that a model meets in training and inference, and that have to be fast.
HOT = {
    "attention_kernel",
    "attention_with_scores_kernel",
    "class_scores_kernel",
    "backward_kernel",
    "query_statistics_kernel",
    "sum_probabilities_kernel",
    "mean_attention_backward_kernel",
    "reorganize_kernel",
    "layer_norm_kernel",
    "merge_kernel",
    "partner_kernel",
    "gather_kernel",
    "restore_backward_kernel",
    "restore_backward_sum_kernel",
    "restore_kernel",
    "scatter_kernel",
}


def cuobjdump() -> str | None:
    """The tool of the CUDA toolkit, or the one that triton brings, which torch brings."""
    found = shutil.which("cuobjdump")
    spec = importlib.util.find_spec("triton")
    if found is None and spec is not None and spec.submodule_search_locations:
        bundled = Path(spec.submodule_search_locations[0]) / "backends/nvidia/bin/cuobjdump"
        found = str(bundled) if bundled.exists() else None
    return found


pytestmark = [
    pytest.mark.skipif(_C.build_info()["cuda"] is None, reason="the module was built without CUDA code"),
    pytest.mark.skipif(cuobjdump() is None, reason="no cuobjdump, neither of a CUDA toolkit nor of triton"),
]


def dump(*options: str) -> str:
    """What cuobjdump says of the module, with readable names of kernels where c++filt is installed."""
    tool = cuobjdump()
    assert tool is not None
    return subprocess.run([tool, *options, _C.__file__], capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def resources() -> list[tuple[str, str, dict[str, int]]]:
    """For every kernel and architecture: both, and the resources that ptxas gave the kernel."""
    found, architecture, name = [], "", ""
    for line in dump("--dump-resource-usage").splitlines():
        if match := re.match(r"arch = (sm_\w+)", line.strip()):
            architecture = match[1]
        elif match := re.match(r"Function (.+):$", line.strip()):
            name = match[1]
        elif "REG:" in line:
            numbers = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)}
            found.append((name, architecture, numbers))
    return found


def test_every_listed_architecture_has_its_code() -> None:
    listed = _C.build_info()["cuda_architectures"].split(";")
    wanted = {"sm_" + arch.removesuffix("+PTX").replace(".", "") for arch in listed}
    files = Counter(re.findall(r"\.(sm_\w+)\.cubin", dump("--list-elf")))
    assert set(files) == wanted
    assert len(set(files.values())) == 1  # every source file for each
    ptx = {"sm_" + arch.removesuffix("+PTX").replace(".", "") for arch in listed if arch.endswith("+PTX")}
    assert set(re.findall(r"\.(sm_\w+)\.ptx", dump("--list-ptx"))) == ptx


def test_no_kernel_spills(resources: list[tuple[str, str, dict[str, int]]]) -> None:
    assert {kernel for kernel in HOT if any(kernel in name for name, _, _ in resources)} == HOT
    spilling = [
        f"{architecture}: {name} uses {numbers['STACK']} bytes of stack"
        for name, architecture, numbers in resources
        # A register that is spilled lies on the stack, and nothing else in these kernels does.
        if numbers["STACK"] > 0 or numbers["LOCAL"] > 0
    ]
    assert spilling == []


@pytest.fixture(scope="module")
def machine_code() -> list[str]:
    """The instructions of all kernels, of the first architecture."""
    architecture = "sm_" + _C.build_info()["cuda_architectures"].split(";")[0].removesuffix("+PTX").replace(
        ".", ""
    )
    return dump("--dump-sass", "--gpu-architecture", architecture).splitlines()


def test_attention_runs_on_tensor_cores(machine_code: list[str]) -> None:
    """Products as matrices, operands as matrices, copies that take no registers, 16 bytes at a time."""
    name = ""
    counts: dict[tuple[str, int, str], Counter[str]] = {}
    for line in machine_code:
        if match := re.search(r"Function : (\S+)", line):
            name = match[1]
        elif kernel := re.search(r"attention_with_scores_kernelI\S*?(BFloat16|Half)ELi(\d+)ELb(\d)E", name):
            of_kernel = counts.setdefault((kernel[1], int(kernel[2]), kernel[3]), Counter())
            if match := re.search(r"^\s+/\*\w+\*/\s+(?:@!?U?P\w+ )?\s*([A-Z0-9.a-z_]+)", line):
                of_kernel[match[1]] += 1
    assert set(counts) == set(itertools.product(("BFloat16", "Half"), (32, 64, 128), "01"))
    for (dtype, width, _bias), instructions in counts.items():
        multiply = "HMMA.16816.F32.BF16" if dtype == "BFloat16" else "HMMA.16816.F32"
        # Of 32 keys at once: products with width / 16 * 4 matrices of keys and as many of values, whose loads
        # bring two each. For whole tiles and for the last, with the class token's row and without.
        assert instructions[multiply] == 4 * (2 * width // 16 * 4), (dtype, width)
        assert instructions["LDSM.16.M88.4"] == instructions["LDSM.16.MT88.4"] == 4 * (width // 16 * 2)
        assert sum(n for i, n in instructions.items() if re.match(r"LDGSTS.*\.128", i)) >= 4
        assert sum(n for i, n in instructions.items() if re.match(r"STG.*\.128", i)) >= 1
        assert not [i for i in instructions if i.startswith(("LDL", "STL", "STS.U16", "STS.U8"))]


def test_class_attention_runs_on_tensor_cores(machine_code: list[str]) -> None:
    """In 16 bits: two matrices of 16 keys, with 64 channels at once and with what is left of them."""
    name = ""
    products: Counter[str] = Counter()
    for line in machine_code:
        if match := re.search(r"Function : (\S+)", line):
            name = match[1]
        elif re.search(r"(class_attention|class_attention_backward)_kernelI", name):
            products[name] += "HMMA.16816.F32" in line
    assert len(products) == 4 * (2 + 4)  # element types; alignments, and with or without a tile
    for kernel, count in products.items():
        in_16_bits = re.search(r"_kernelI\S*?(BFloat16|Half)E", kernel) is not None
        assert count == (2 * 8 if in_16_bits else 0), kernel


def test_mean_attention_runs_on_tensor_cores(machine_code: list[str]) -> None:
    """In 16 bits: of a tile, 2 x 4 matrices by two steps of 32 channels; as many again for gradients."""
    name = ""
    products: Counter[str] = Counter()
    copies: Counter[str] = Counter()
    for line in machine_code:
        if match := re.search(r"Function : (\S+)", line):
            name = match[1]
        elif re.search(r"(query_statistics|sum_probabilities|mean_attention_backward)_kernelI", name):
            products[name] += "HMMA.16816.F32" in line
            copies[name] += bool(re.search(r"LDGSTS\S*\.128", line))
    assert len(products) == 4 * (2 + 1 + 2)  # with gradients and without; of queries and of keys
    for kernel, count in products.items():
        in_16_bits = re.search(r"_kernelI\S*?(BFloat16|Half)E", kernel) is not None
        of_tile = 2 * 4 * 4
        assert count == in_16_bits * of_tile * (2 if "backward" in kernel else 1), kernel
        assert copies[kernel] >= 1, kernel


def test_rows_move_16_bytes_at_a_time(machine_code: list[str]) -> None:
    """An assignment of 16 bytes may become several instructions: the machine code says what it became."""
    name = ""
    accesses: dict[str, Counter[str]] = {}  # of 16 bytes, of each kernel
    for line in machine_code:
        if match := re.search(r"Function : (\S+)", line):
            name = match[1]
        elif match := re.search(r"\b(LDG|STG)\.(\S+)", line):
            accesses.setdefault(name, Counter())[match[1]] += "128" in match[2].split(".")
    # Mangled: BFloat16, aligned rows.
    moving = [
        n
        for n in accesses
        if re.search(
            r"(reorganize|gather|merge|merge_backward|restore|restore_backward|restore_backward_sum)_kernelI\S*BFloat16ELb1E",
            n,
        )
    ]
    assert moving
    for kernel in moving:
        assert accesses[kernel]["LDG"] >= 2 and accesses[kernel]["STG"] >= 2, kernel
    reading = [n for n in accesses if re.search(r"attention_kernelI\S*BFloat16ELb1E", n)]
    assert reading
    for kernel in reading:
        assert accesses[kernel]["LDG"] >= 4, kernel


def test_row_kernels_divide_in_32_bits(machine_code: list[str]) -> None:
    """A division of 64 bits is a function, which takes registers and time before the first load."""
    kernels = r"(gather|restore|restore_backward)_kernelI"  # others may have functions for votes and shuffles
    name = ""
    seen: set[str] = set()
    calling: set[str] = set()
    for line in machine_code:
        if match := re.search(r"Function : (\S+)", line):
            name = match[1]
            if kernel := re.search(kernels, name):
                seen.add(kernel[1])
        elif re.search(r"\bRET\b", line) and re.search(kernels, name):  # a failed assertion does not return
            calling.add(name)
    assert len(seen) == 3
    assert calling == set()
