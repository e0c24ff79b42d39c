"""Let Nsight Compute count what each operator's kernels do on a GPU, once, at DeiT-S, batch 256, bfloat16.

    python benchmarks/kernel_counters.py --output benchmarks/results/counters-GPU

Runs itself under `ncu`, the clocks left as they are and the caches emptied before every kernel, and writes
the counters to OUTPUT.csv: the raw page of ncu, with the operator of each kernel and without what it says of
the machine. benchmarks/kernel_limits.py makes docs/kernels-on-a-gpu.md of them. Exit code: 0 counted, 1 ncu
failed, 2 there is no ncu or no GPU.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from nsight_csv import Page, read_page, with_operators, without_operators, write_page
from operator_times import work
from operator_times.facts import MODELS, machine
from time_limit import TimeLimit, write_whole

#: What comes with every version of the tool that knows a GPU of compute capability 9.0.
SECTIONS = (
    *("SpeedOfLight", "MemoryWorkloadAnalysis", "MemoryWorkloadAnalysis_Tables", "ComputeWorkloadAnalysis"),
    *("LaunchStats", "Occupancy", "SchedulerStats", "WarpStateStats"),
)
#: And counters by name, each under the names that versions and GPUs have for it.
METRICS = (
    ("gpu__time_duration.sum",),
    ("dram__bytes_read.sum", "dram__bytes_op_read.sum"),
    ("dram__bytes_write.sum", "dram__bytes_op_write.sum"),
    (
        "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed",
        "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    ),
    (
        "dram__bytes_read.sum.pct_of_peak_sustained_elapsed",
        "dram__bytes_op_read.sum.pct_of_peak_sustained_elapsed",
    ),
    (
        "dram__bytes_write.sum.pct_of_peak_sustained_elapsed",
        "dram__bytes_op_write.sum.pct_of_peak_sustained_elapsed",
    ),
    (
        "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",
        "sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active",
    ),
    ("l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum",),
    ("l1tex__data_pipe_lsu_wavefronts_mem_shared.sum",),
)
MARKER = "spin_kernel"  # of torch.cuda._sleep
MODEL, BATCH = "DeiT-S", 256


def run_each(
    model: tuple[int, int, int],
    batch: int,
    dtype: torch.dtype,
    device: str,
    begin: Callable[[], object],
    end: Callable[[], object],
) -> list[str]:
    """Run each operator to set up what it needs, then between `begin` and `end`; return their names."""
    heads, tokens, _ = model
    sets = [work.make_inputs(model, batch, dtype, device, seed=0)]
    names = []
    for operation in work.operations(heads, tokens):
        if operation.name == "stage":  # two operators, which are there by themselves
            continue
        for direction in ("forward", "backward") if operation.moved_backward else ("forward",):
            if direction == "backward":
                call = work.differentiated(operation, operation.ours, sets)
            else:
                call = partial(_forward, operation, sets)
            call(0)
            begin()
            call(0)
            end()
            names.append(f"{operation.name} {direction}")
    return names


@torch.no_grad()
def _forward(operation: work.Operation, sets: list[work.Inputs], number: int) -> object:
    return operation.ours(*operation.arguments(sets[number]))


def be_counted(names_to: Path) -> None:
    """Be the process that ncu watches: it counts between start and stop of the profiler."""

    def begin() -> None:
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        torch.cuda._sleep(1)

    def end() -> None:
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()

    names_to.write_text(json.dumps(run_each(MODELS[MODEL], BATCH, torch.bfloat16, "cuda", begin, end)))


def find_ncu() -> str:
    """Return the path of ncu: on PATH, in the toolkit, or where Nsight Compute is installed; else ""."""
    homes = [Path(home) for name in ("CUDA_HOME", "CUDA_PATH") if (home := os.environ.get(name))]
    folders = [str(home / "bin") for home in (*homes, Path("/usr/local/cuda"))]
    folders += [str(path) for path in sorted(Path("/opt/nvidia/nsight-compute").glob("*"), reverse=True)]
    return shutil.which("ncu", path=os.pathsep.join([os.environ.get("PATH", ""), *folders])) or ""


def known_metrics(listed: str) -> list[str]:
    """Return the counters that there are, by what `ncu --query-metrics` prints; the first names if nothing.

    One name that this ncu does not know for this GPU, and it measures nothing at all.
    """
    there = set(re.findall(r"^\s*(\w+__\w+)\s", listed, re.M))
    found = [next((name for name in names if name.split(".")[0] in there), None) for names in METRICS]
    return [name for name in found if name] or [names[0] for names in METRICS]


def count(ncu: str, report: Path, names_to: Path, limit: TimeLimit) -> tuple[str, list[str]]:
    """Have everything counted; return the raw page, and what was asked of ncu beyond its sections.

    Raises:
        RuntimeError: ncu failed, or there was no time left.
    """
    sections = [option for section in SECTIONS for option in ("--section", section)]
    options = ["--profile-from-start", "off", "--clock-control", "none", "--cache-control", "all", *sections]
    watched = [sys.executable, str(Path(__file__).resolve()), "--work", str(names_to)]
    code, listed = _output([ncu, "--query-metrics"], limit)
    said = ""
    for metrics in (known_metrics(listed if code == 0 else ""), []):
        by_name = ["--metrics", ",".join(metrics)] if metrics else []
        command = [ncu, *options, *by_name, "--force-overwrite", "--export", str(report), *watched]
        code, said = _output(command, limit)
        if code == 0 and report.exists():
            code, page = _output(
                [ncu, "--import", str(report), "--csv", "--page", "raw", "--print-units", "base"], limit
            )
            if code == 0:
                return page, metrics
            said = page
        print(said, flush=True)
        if "Failed to find metric" not in said:  # without these names it would fail again
            break
        if metrics:
            print("ncu failed; once more without counters by name", flush=True)
    lines = said.strip().splitlines() or ["it said nothing"]
    raise RuntimeError(f"ncu failed: {next((line for line in lines if '==ERROR==' in line), lines[-1])}")


def _output(command: list[str], limit: TimeLimit) -> tuple[int, str]:
    """Exit code and output; what it has started ends with it, when there is no time left."""
    seconds = limit.left
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
        env={**os.environ, "LC_ALL": "C"},  # else numbers may have a comma for a point
    )
    try:
        said, _ = process.communicate(timeout=None if math.isinf(seconds) else max(1.0, seconds))
    except BaseException as error:
        os.killpg(process.pid, signal.SIGKILL)
        said, _ = process.communicate()
        if isinstance(error, subprocess.TimeoutExpired):
            print(said, flush=True)
            raise RuntimeError(f"ncu was not done in time ({seconds:.0f} s were left)") from None
        raise
    return process.returncode, said


def named(page: Page, names_from: Path) -> tuple[Page, str]:
    """Return the page with the operators named; or without, and why: what was counted is not to be lost."""
    try:
        return with_operators(page, json.loads(names_from.read_text()), MARKER), ""
    except (OSError, ValueError) as error:
        return without_operators(page), f"it is not known which operator the kernels are of: {error}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--output", type=Path, help="write OUTPUT.csv and OUTPUT.json (default: print)")
    parser.add_argument("--minutes", type=float, default=2.0, help="for everything (default: 2)")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        be_counted(arguments.work)
        return 0
    ncu = find_ncu()
    problem = "" if ncu else "no ncu: install Nsight Compute, which comes with the CUDA toolkit"
    if not torch.cuda.is_available():
        problem = "no GPU: torch.cuda.is_available() is False"
    if problem:
        print(f"kernel_counters: there is {problem}", file=sys.stderr)
        return 2
    limit = TimeLimit(arguments.minutes)
    try:
        with tempfile.TemporaryDirectory() as folder:
            names_to = Path(folder) / "operators.json"
            page, metrics = count(ncu, Path(folder) / "report.ncu-rep", names_to, limit)
            counted, problem = named(read_page(page), names_to)
    except (RuntimeError, ValueError, OSError) as error:
        print(f"kernel_counters: {error}", file=sys.stderr)
        return 1
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        write_whole(arguments.output.with_suffix(".csv"), write_page(counted))
        code, version = _output([ncu, "--version"], limit)
        facts = {
            **machine("cuda"),
            "ncu": version.strip().splitlines()[-1] if code == 0 and version else "unknown",
        }
        contents = {"machine": facts, "model": MODEL, "batch": BATCH, "dtype": "bfloat16"}
        contents |= {"sections": list(SECTIONS), "metrics": metrics}
        write_whole(arguments.output.with_suffix(".json"), json.dumps(contents, indent=1) + "\n")
    else:
        print(write_page(counted))
    print(f"{len(counted.lines)} kernels of {len({line[0] for line in counted.lines})} operators")
    if problem:
        print(f"kernel_counters: {problem}", file=sys.stderr)
        return 1
    print(f"in {limit.clock}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
