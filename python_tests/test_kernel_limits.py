"""The page of kernels against their limits, and its counters, with a stand-in for Nsight Compute.

No figure here was measured on a GPU: times and counters are made up, in the format of the tools.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
if not BENCHMARKS.exists():
    pytest.skip("tests run without the source tree", allow_module_level=True)
sys.path.insert(0, str(BENCHMARKS))

import kernel_counters  # noqa: E402
import kernel_limits  # noqa: E402
from nsight_csv import Kernel, kernels, read_page, with_operators, write_page  # noqa: E402
from time_limit import TimeLimit  # noqa: E402

DRAM = "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed"
SM = "sm__throughput.avg.pct_of_peak_sustained_elapsed"
TENSOR = "sm__inst_executed_pipe_tensor_op_hmma.avg.pct_of_peak_sustained_active"
LONG, SHORT, SELECTED = (
    f"smsp__average_warps_issue_stalled_{name}_per_issue_active.ratio"
    for name in ("long_scoreboard", "short_scoreboard", "selected")
)
OF_PEAK = ".sum.pct_of_peak_sustained_elapsed"
COLUMNS = ("ID", "Process ID", "Process Name", "Host Name", "Kernel Name", "Context", "Stream", "Block Size")
COLUMNS += ("Grid Size", "Device", "CC")
COUNTERS = {
    "breakdown:gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed": "",
    "device__attribute_display_name": "",
    "gpu__time_duration.sum": "ns",
    "dram__bytes_read.sum": "Mbyte",
    "dram__bytes_write.sum": "byte",
    DRAM: "%",
    SM: "%",
    TENSOR: "%",
    "launch__waves_per_multiprocessor": "",
    "l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum": "",
    "l1tex__data_pipe_lsu_wavefronts_mem_shared.sum": "",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "%",
    LONG: "inst",
    SHORT: "inst",
    SELECTED: "inst",
}
CLASS_ATTENTION = "void evit::cuda::<unnamed>::class_attention_kernel<__nv_bfloat16, true>(Attention<T>, int)"
LAUNCHES = (
    ("at::cuda::(anonymous namespace)::spin_kernel(long)", ()),
    (
        CLASS_ATTENTION,
        (
            "",
            "NVIDIA Example 9000",
            "12,345",
            "40.5",
            "1,000,000",
            "85.25",
            "20",
            "0",
            "2.5",
            "5",
            "100",
            "61.5",
            "6",
            "3",
            "1",
        ),
    ),
    ("at::cuda::(anonymous namespace)::spin_kernel(long)", ()),
    (
        "void evit::select_kernel<float>(int)",
        (
            "",
            "NVIDIA Example 9000",
            "9,000",
            "1",
            "0",
            "30",
            "20",
            "n/a",
            "0.5",
            "0",
            "0",
            "6",
            "2",
            "7",
            "1",
        ),
    ),
    (
        "void evit::sum_kernel(int)",
        ("", "NVIDIA Example 9000", "9,000", "1", "0", "30", "70", "69", "2", "30", "60", "6", "2", "7", "1"),
    ),
)


def raw_page() -> str:
    """What `ncu --csv --page raw` prints: made up, in its form.

    Columns that are no counters (of the launch, of the device, and breakdowns of a throughput) stand among
    them; numbers have thousands separators; what a GPU has not is n/a, or nothing.
    """
    lines = ["==PROF== Connected to process 4321 (/usr/bin/python3)", "something that the program printed"]
    lines.append('==PROF== Profiling "spin_kernel" - 0: 0%....50%....100% - 38 passes')
    lines.append(",".join(f'"{name}"' for name in (*COLUMNS, *COUNTERS)))
    lines.append(",".join(f'"{unit}"' for unit in ("",) * len(COLUMNS) + tuple(COUNTERS.values())))
    for number, (name, values) in enumerate(LAUNCHES):
        before = (str(number), "4321", "python3", "a-host", name, "1", "7", "(256, 1, 1)", "(2,048, 1, 1)")
        before += ("0", "9.0")
        after = values or ("1",) * len(COUNTERS)
        lines.append(",".join(f'"{value}"' for value in (*before, *after)))
    return "\n".join([*lines, "==PROF== Disconnected from process 4321"])


OPERATORS = ["class_attention forward", "reorganize_tokens forward"]


def counted() -> list[Kernel]:
    return kernels(with_operators(read_page(raw_page()), OPERATORS, kernel_counters.MARKER))


def test_the_raw_page_is_read() -> None:
    first, second, third = counted()
    assert [kernel.operator for kernel in (first, second, third)] == [OPERATORS[0], *OPERATORS[1:] * 2]
    assert first.short_name == "class_attention_kernel" and third.short_name == "sum_kernel"
    assert first.counters["gpu__time_duration.sum"] == pytest.approx(12.345e-6)
    assert first.counters["dram__bytes_read.sum"] == 40.5e6
    assert first.counters["dram__bytes_write.sum"] == 1e6
    assert TENSOR not in second.counters and second.counters[DRAM] == 30


def test_the_names_of_columns_that_stand_again_are_no_kernel() -> None:
    """As of several processes in one report."""
    page = raw_page()
    names = next(line for line in page.splitlines() if line.startswith('"ID"'))
    assert read_page(f"{page}\n{names}\n") == read_page(page)


def test_what_is_kept_names_no_machine() -> None:
    text = write_page(with_operators(read_page(raw_page()), OPERATORS, kernel_counters.MARKER))
    assert not any(word in text for word in ("a-host", "4321", "python3", "spin_kernel"))
    again = kernels(read_page(text))
    assert again == counted()


def test_counters_are_not_lost_with_the_operators_names(tmp_path: Path) -> None:
    """Should the kernels between the operators have another name some day."""
    page = read_page(raw_page().replace("spin_kernel", "sleeping_kernel"))
    (tmp_path / "names.json").write_text(json.dumps(OPERATORS))
    for names, said in ((tmp_path / "names.json", "before the first operator"), (tmp_path / "no", "No such")):
        found, problem = kernel_counters.named(page, names)
        assert "not known which operator" in problem and said in problem
        assert {line[0] for line in found.lines} == {"unknown"} and len(found.lines) == len(LAUNCHES)
        assert "a-host" not in write_page(found)
        assert "| unknown | `class_attention_kernel` | 12.3 |" in kernel_limits.counters_part(kernels(found))
    found, problem = kernel_counters.named(read_page(raw_page()), tmp_path / "names.json")
    assert kernels(found) == counted() and problem == ""


@pytest.mark.parametrize(
    ("text", "operators", "said"),
    [
        ("==ERROR== ERR_NVGPUCTRPERM", OPERATORS, "it says: ==ERROR== ERR_NVGPUCTRPERM"),
        ("", OPERATORS, "it says: nothing"),
        ('"ID","Kernel Name","Metric Name","Metric Value"', OPERATORS, "expected --page raw"),
        (raw_page().replace('"12,345",', ""), OPERATORS, "expected 26 fields"),
        (raw_page(), OPERATORS[:1], "2 operators were measured, expected 1"),
        (raw_page(), [*OPERATORS, "more"], "2 operators were measured, expected 3"),
        (raw_page().replace("::spin_kernel", "::other", 1), OPERATORS, "before the first operator"),
    ],
)
def test_another_page_is_refused(text: str, operators: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        with_operators(read_page(text), operators, kernel_counters.MARKER)


@pytest.mark.parametrize(
    ("unit", "factor"),
    [
        ("Gbyte", 1e9),
        ("byte/s", 1.0),
        ("us", 1e-6),
        ("usecond", 1e-6),
        ("%", 1.0),
        ("Mhz", 1.0),
        ("Kbyte", 1e3),
    ],
)
def test_units(unit: str, factor: float) -> None:
    page = f'"Kernel Name","a__b.sum"\n"","{unit}"\n"k","2"\n'
    assert kernels(read_page(page))[0].counters == {"a__b.sum": 2 * factor}


def kernel(**counters: float) -> Kernel:
    long_names = {
        "dram": DRAM,
        "sm": SM,
        "tensor": TENSOR,
        "long": LONG,
        "short": SHORT,
        "selected": SELECTED,
    }
    long_names |= {"waves": "launch__waves_per_multiprocessor"}
    return Kernel(
        "operator", "kernel", {long_names.get(name, name): value for name, value in counters.items()}
    )


@pytest.mark.parametrize(
    ("counters", "words"),
    [
        ({}, "not counted"),
        ({"dram": 80.0, "sm": 20.0}, "device memory, at 80%"),
        # Some versions count reads and writes apart, under one name or the other.
        ({"dram__bytes_read" + OF_PEAK: 50.0, "dram__bytes_write" + OF_PEAK: 35.0}, "device memory, at 85%"),
        (
            {"dram__bytes_op_read" + OF_PEAK: 50.0, "dram__bytes_op_write" + OF_PEAK: 35.0},
            "device memory, at 85%",
        ),
        (
            {"dram__bytes_read" + OF_PEAK: 85.0, "sm": 20.0},
            "waiting: nothing is busier than 20% (issuing instructions)",
        ),
        ({"dram": 79.0, "sm": 20.0}, "mostly device memory, at 79%"),
        ({"dram": 30.0, "sm": 90.0, "tensor": 88.0}, "tensor cores, at 90%"),
        ({"dram": 30.0, "sm": 90.0, "tensor": 20.0}, "issuing instructions, at 90%"),
        ({"dram": 59.0, "sm": 20.0}, "waiting: nothing is busier than 59% (device memory)"),
        (
            {"dram": 40.0, "long": 6.0, "short": 3.0, "selected": 1.0, "waves": 0.25},
            "waiting: nothing is busier than 40% (device memory); its warps wait most for device memory or "
            "L2 (60% of their time); its blocks are 25% of what the GPU runs at once",
        ),
        # What a warp issues is no wait, however often.
        (
            {"dram": 40.0, "short": 1.0, "selected": 3.0, "waves": 1.0},
            "waiting: nothing is busier than 40% (device memory); its warps wait most for shared memory "
            "(25% of their time)",
        ),
    ],
)
def test_the_rule_for_the_wording(counters: dict[str, float], words: str) -> None:
    assert kernel_limits.held_back_by(kernel(**counters)) == words


def test_bank_conflicts_and_bytes_under_other_names() -> None:
    conflicts, wavefronts = (
        "l1tex__data_bank_conflicts_pipe_lsu_mem_shared",
        "l1tex__data_pipe_lsu_wavefronts_mem_shared",
    )
    apart = {f"{conflicts}_op_ld.sum": 20.0, f"{conflicts}_op_st.sum": 5.0, f"{wavefronts}_op_ld.sum": 100.0}
    assert kernel_limits.conflicts(kernel(**apart)) == 0.25
    assert kernel_limits.conflicts(kernel(**{f"{wavefronts}.sum": 100.0})) is None
    both = {"dram__bytes_op_read.sum": 3.0, "dram__bytes_op_write.sum": 4.0}
    assert kernel_limits.moved_bytes(kernel(**both)) == 7.0
    assert kernel_limits.moved_bytes(kernel(**{"dram__bytes_read.sum": 3.0})) is None


def operators() -> dict[str, Any]:
    def row(operator: str, direction: str, moved: int, micro: float, **changed: Any) -> dict[str, Any]:
        of: dict[str, Any] = {"model": "DeiT-S", "batch": 256, "dtype": "bfloat16", "operator": operator}
        of |= {"direction": direction, "bytes": moved, "microseconds": {"ours, replayed": micro}}
        return of | {"gigabytes_per_second": {"ours": moved / micro / 1e3}} | changed

    rows = [
        row("class_attention", "forward", 40_000_000, 12.5),
        row("fuse_tokens", "forward", 20_000_000, 10.0),
    ]
    rows.append(row("stage", "forward", 1, 1.0, batch=1))
    machine = {"gpu": "NVIDIA Example 9000", "torch": "2.99", "commit": "abc"}
    return {"machine": machine, "copy_gigabytes_per_second": 4000.0, "rows": rows}


def test_the_page(tmp_path: Path) -> None:
    """Of made-up figures, written beside the documentation and not into it."""
    (tmp_path / "operators.json").write_text(json.dumps(operators()))
    page_of_counters = write_page(with_operators(read_page(raw_page()), OPERATORS, kernel_counters.MARKER))
    (tmp_path / "counters.csv").write_text(page_of_counters)
    page = tmp_path / "page.md"
    given = (
        "--operators",
        tmp_path / "operators.json",
        "--counters",
        tmp_path / "counters.csv",
        "--page",
        page,
    )
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "kernel_limits.py", *given], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    text = page.read_text()
    assert "- gpu: NVIDIA Example 9000\n" in text and "![Share of the copy" in text and "(page.png)" in text
    assert "| class_attention forward | 40.0 MB | 10.0 µs | 12.5 µs | 80% | ≥ 75% |" in text
    assert "| fuse_tokens forward | 20.0 MB | 5.0 µs | 10.0 µs | 50% | – |" in text and "stage" not in text
    assert (
        "| class_attention forward | `class_attention_kernel` | 12.3 | 41.5 MB | 85% | – | – | 0% | 20% "
        "| 62% | 5% | device memory, at 85% |" in text
    )
    assert "mostly tensor cores, at 70%; 50% of shared memory's work are bank conflicts |" in text
    assert "its blocks are 50% of what the GPU runs at once |" in text
    assert page.with_suffix(".png").stat().st_size > 5_000
    without = kernel_limits.page(operators(), [])
    assert "needs Nsight Compute" in without and "not measured yet" not in without.lower()


def test_the_page_in_the_documentation_is_what_the_results_give() -> None:
    """As long as there are none, it says so."""
    given, counters = kernel_limits.latest(kernel_limits.RESULTS)
    found = json.loads(given.read_text()) if given else None
    of_kernels = kernels(read_page(counters.read_text())) if counters else []
    image = kernel_limits.PAGE.with_suffix(".png").name if found else ""
    assert kernel_limits.PAGE.read_text() == kernel_limits.page(found, of_kernels, image)
    assert given or "**Not measured yet**" in kernel_limits.PAGE.read_text()


def test_results_of_several_gpus(tmp_path: Path) -> None:
    assert kernel_limits.latest(tmp_path) == (None, None)
    for name in ("operators-cpu.json", "operators-a.json", "counters-a.csv", "counters-b.csv"):
        (tmp_path / name).touch()
    assert kernel_limits.latest(tmp_path) == (tmp_path / "operators-a.json", tmp_path / "counters-a.csv")
    (tmp_path / "operators-b.json").touch()
    with pytest.raises(ValueError, match="operators-a.json, operators-b.json: choose"):
        kernel_limits.latest(tmp_path)


def test_every_operator_runs_once_between_the_marks(one_thread: None) -> None:
    """What ncu would watch, on the CPU."""
    marks: list[str] = []
    names = kernel_counters.run_each(
        (2, 12, 8), 2, torch.float32, "cpu", lambda: marks.append("begin"), lambda: marks.append("end")
    )
    assert marks == ["begin", "end"] * len(names) and len(set(names)) == len(names)
    assert names[:3] == [
        "class_attention forward",
        "class_attention backward",
        "attention_with_scores forward",
    ]
    assert "reorganize_tokens backward" in names and not any(name.startswith("stage") for name in names)


QUERIED = """\
Device NVIDIA Example 9000 (GX900)
--------------------- ------------ ---------------- ------------------------------------
Metric Name           Metric Type  Metric Unit      Metric Description
--------------------- ------------ ---------------- ------------------------------------
dram__bytes_op_read   Counter      byte             # of bytes read from DRAM
gpu__time_duration    Counter      nanosecond       incremental duration
"""


def stand_in(tmp_path: Path, refuses: str = "", listed: str = "", says: str = "") -> str:
    """A program that behaves as ncu does: counts into --export, prints a page on --import."""
    script = tmp_path / "ncu"
    (tmp_path / "raw.csv").write_text(raw_page())
    says = says or "==PROF== Connected to process 1\n==ERROR== Failed to find metric regex:^no_such"
    script.write_text(
        f"#!{sys.executable}\n"
        "import os, pathlib, sys, time\n"
        "given = sys.argv[1:]\n"
        "if '--query-metrics' in given:\n"
        f"    print({listed!r}); raise SystemExit(0 if {listed!r} else 1)\n"
        f"if {refuses!r} and {refuses!r} in given:\n"
        f"    print({says!r}); print('the end'); raise SystemExit(1)\n"
        "if '--import' in given:\n"
        f"    print(pathlib.Path({str(tmp_path / 'raw.csv')!r}).read_text())\n"
        "else:\n"
        "    assert os.environ['LC_ALL'] == 'C' and given[given.index('--clock-control') + 1] == 'none'\n"
        "    pathlib.Path(given[given.index('--export') + 1]).touch()\n"
    )
    script.chmod(0o755)
    return str(script)


def test_counters_are_asked_for_by_the_names_that_this_gpu_has() -> None:
    assert kernel_counters.known_metrics(QUERIED) == [
        "gpu__time_duration.sum",
        "dram__bytes_op_read.sum",
        "dram__bytes_op_read.sum.pct_of_peak_sustained_elapsed",
    ]
    first = [names[0] for names in kernel_counters.METRICS]
    assert kernel_counters.known_metrics("") == kernel_counters.known_metrics("==ERROR== x") == first
    assert "dram__bytes_read.sum" in first


def test_without_counters_by_name_where_ncu_does_not_know_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report, names = tmp_path / "report.ncu-rep", tmp_path / "names.json"
    ncu = stand_in(tmp_path, listed=QUERIED)
    page, metrics = kernel_counters.count(ncu, report, names, TimeLimit(1.0))
    assert len(metrics) == 3 and len(read_page(page).lines) == len(LAUNCHES)
    page, metrics = kernel_counters.count(stand_in(tmp_path, "--metrics"), report, names, TimeLimit(1.0))
    assert metrics == [] and len(read_page(page).lines) == len(LAUNCHES)
    assert "once more without counters by name" in capsys.readouterr().out
    with pytest.raises(RuntimeError, match="ncu failed: ==ERROR== Failed to find metric"):
        kernel_counters.count(stand_in(tmp_path, "--section"), report, names, TimeLimit(1.0))


@pytest.mark.parametrize(
    ("says", "told"),
    [
        (
            "==WARNING== No kernels were profiled.\\n==ERROR== ERR_NVGPUCTRPERM - no permission",
            "==ERROR== ERR_NVGPUCTRPERM - no permission",
        ),
        ("Traceback: the program failed", "the end"),
    ],
)
def test_what_would_fail_again_is_not_tried_again(
    says: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ncu = stand_in(tmp_path, "--section", QUERIED, says.replace("\\n", "\n"))
    with pytest.raises(RuntimeError) as failed:
        kernel_counters.count(ncu, tmp_path / "r", tmp_path / "n", TimeLimit(1.0))
    assert str(failed.value) == f"ncu failed: {told}"
    assert "once more" not in capsys.readouterr().out


def test_what_ncu_watches_ends_with_it(tmp_path: Path) -> None:
    """It otherwise stays, and keeps the GPU busy."""
    script = tmp_path / "ncu"
    child = f"sleep 60 & echo $! > {tmp_path}/child; wait"
    script.write_text(f"#!/bin/sh\n[ $1 = --query-metrics ] && exit 1\n{child}\n")
    script.chmod(0o755)
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="not done in time"):
        kernel_counters.count(str(script), tmp_path / "r", tmp_path / "n", TimeLimit(1 / 60))
    assert time.monotonic() - start < 30
    status = Path(f"/proc/{(tmp_path / 'child').read_text().strip()}/status")
    end = time.monotonic() + 5
    while status.exists() and "State:\tZ" not in status.read_text() and time.monotonic() < end:
        time.sleep(0.05)
    assert not status.exists() or "State:\tZ" in status.read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_one_line_where_there_is_no_gpu() -> None:
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "kernel_counters.py"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "kernel_counters: there is no GPU: torch.cuda.is_available() is False\n"
