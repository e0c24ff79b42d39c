"""What the figures were measured on and with."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch

from evit_ext import _C

MODELS = {"DeiT-S": (6, 197, 64), "DeiT-B": (12, 197, 64)}  # H, N, D
KEEP_RATE = 0.7


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if "model name" in line]
        if names:
            return names[0]
    return platform.processor() or platform.machine()


def _output(*command: str) -> str:
    try:
        run = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return run.stdout.strip() if run.returncode == 0 else ""


def commit() -> str:
    """EVIT_COMMIT where the source came without its history, else what git said when it was first asked.

    To be called before results are written, which change the tree.
    """
    return os.environ.get("EVIT_COMMIT") or _commit_of_git()


@cache
def _commit_of_git() -> str:
    head = _output("git", "rev-parse", "HEAD")
    if not head:
        return "unknown"
    return head + (" with changes" if _output("git", "status", "--porcelain") else "")


def machine(device: str) -> dict[str, Any]:
    """Machine, versions and command; of the GPU where that is what was measured."""
    info = _C.build_info()
    facts: dict[str, Any] = {"processor": _processor()}
    if device == "cuda":
        gpu = torch.cuda.get_device_properties(0)
        driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        facts |= {
            "gpu": gpu.name,
            "multiprocessors": gpu.multi_processor_count,
            "l2_mib": round(gpu.L2_cache_size / 2**20, 1),
            "driver": driver.splitlines()[0] if driver else "nvidia-smi does not say",
            "torch_cuda": torch.version.cuda,
            "built_with_cuda": info["cuda"],
            "cuda_architectures": info["cuda_architectures"],
        }
    else:
        facts |= {"threads": torch.get_num_threads(), "cpu_capability": info["cpu_capability"]}
    return facts | {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "compiler": info["compiler"],
        "commit": commit(),
        "command": shlex.join(["python", *sys.argv]),
    }
