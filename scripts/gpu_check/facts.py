"""What is checked, on what, and with what."""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from .outcomes import last_line
from .paths import ROOT

# Run by the Python that is checked, which need not be the one that runs this script.
FACTS = """
import importlib.metadata, json, platform
import torch

def version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"

facts = {"gpu": None, "python": platform.python_version(), "torch": torch.__version__}
facts["torch_cuda"] = torch.version.cuda
for name in ("timm", "triton", "numpy", "setuptools", "pybind11", "pytest", "hypothesis", "expecttest"):
    facts[name] = version(name)
if torch.cuda.is_available():
    gpu = torch.cuda.get_device_properties(0)
    facts.update(gpu=gpu.name, gpus=torch.cuda.device_count(), capability=f"{gpu.major}.{gpu.minor}",
                 multiprocessors=gpu.multi_processor_count, memory_gib=round(gpu.total_memory / 2**30, 1),
                 l2_mib=round(gpu.L2_cache_size / 2**20, 1))
print("FACTS" + json.dumps(facts))
"""


def output_of(*command: str) -> str:
    """What a command prints, or an empty string where it cannot be run."""
    try:
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return run.stdout.strip() if run.returncode == 0 else ""


def commit() -> str:
    """What is checked: EVIT_COMMIT, else what git says, else "unknown"."""
    if os.environ.get("EVIT_COMMIT"):
        return os.environ["EVIT_COMMIT"]
    head = output_of("git", "rev-parse", "HEAD")
    if not head:
        return "unknown"
    return head + (" with changes" if output_of("git", "status", "--porcelain") else "")


def beside_python(python: str = "") -> list[str]:
    """Folders of this Python and of the one that is checked: programs that pip installs lie there."""
    programs = [sys.executable, shutil.which(python) if python else None]
    return list(dict.fromkeys(str(Path(program).parent) for program in programs if program))


def program(name: str, python: str = "") -> str:
    """Path of a program on PATH or beside a Python, or an empty string."""
    search = os.pathsep.join([os.environ.get("PATH", ""), *beside_python(python)])
    return shutil.which(name, path=search) or ""


def cuda_tool(name: str) -> str:
    """Path of one of the toolkit's programs, or an empty string."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    folders = ([Path(home)] if home else []) + [Path("/usr/local/cuda")]
    places = [folder / "bin" for folder in folders] + [folder / "compute-sanitizer" for folder in folders]
    # Nsight Compute has a folder of its own, too, one for each version.
    profilers = sorted(Path("/opt/nvidia/nsight-compute").glob("*"), reverse=True)
    search = os.pathsep.join([os.environ.get("PATH", ""), *map(str, places), *map(str, profilers)])
    return shutil.which(name, path=search) or ""


def collect_facts(python: str) -> dict[str, Any]:
    """GPU, versions, commit and command. Raises RuntimeError with one line where there is no GPU."""
    try:
        run = subprocess.run([python, "-c", FACTS], capture_output=True, text=True, timeout=300, cwd="/")
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RuntimeError(f"{python} cannot be asked: {error}") from None
    found = re.search(r"^FACTS(.*)$", run.stdout, re.M)
    if not found:
        raise RuntimeError(f"{python} cannot say: {last_line(run.stderr)[1]}")
    facts: dict[str, Any] = json.loads(found[1])
    if not facts["gpu"]:
        raise RuntimeError(f"torch.cuda.is_available() is False in {python}, torch {facts['torch']}")
    driver = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    facts["driver"] = driver.splitlines()[0] if driver else "nvidia-smi does not say"
    nvcc = cuda_tool("nvcc")
    release = re.search(r"release (.+)", output_of(nvcc, "--version")) if nvcc else None
    facts["nvcc"] = release[1] if release else "not found"
    facts["processor"] = platform.machine()
    facts["cores"] = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    facts["commit"] = commit()
    facts["command"] = shlex.join([f"scripts/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    return facts


def slug_of(name: str) -> str:
    """A GPU's name as part of a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
