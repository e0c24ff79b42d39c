"""What became of a step, told from its log."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

PASSED, FAILED, TIMED_OUT, NOT_RUN = "passed", "failed", "timed out", "not run"

#: From the log of a step, what became of it and what it says in short. PASSED needs exit code 0 as well.
Judge = Callable[[str], tuple[str, str]]


def last_line(log: str) -> tuple[str, str]:
    """Any log will do; the last line that says something."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return PASSED, lines[-1] if lines else "no output"


def pytest_summary(log: str) -> tuple[str, str]:
    """At least one test must have passed: a run in which all are skipped checks nothing."""
    found = re.findall(r"^=+ (.*\b(?:passed|failed|skipped|errors?|deselected)\b.*) in [\d.]+s", log, re.M)
    stopped = re.search(r"!+ (.+ lost the CUDA context.*?) !+", log)
    summary = found[-1] if found else f"no summary; last line: {last_line(log)[1]}"
    return (
        PASSED if re.search(r"\d passed", summary) else FAILED,
        f"{summary}; {stopped[1]}" if stopped else summary,
    )


def sanitizer_summary(log: str) -> tuple[str, str]:
    """There must be a summary, and it must count nothing."""
    if "Device not supported" in log:
        return NOT_RUN, "compute-sanitizer says: Device not supported"
    found = re.findall(r"((?:ERROR|RACECHECK) SUMMARY: (\d+) .*)", log)
    if not found:
        return FAILED, f"no summary; last line: {last_line(log)[1]}"
    return PASSED if all(count == "0" for _, count in found) else FAILED, found[-1][0]


def benchmark_summary(log: str) -> tuple[str, str]:
    """A missed target is a result, not a failure; results that are wrong end the benchmark with an error."""
    found = re.findall(r"^targets met: .*$", log, re.M)
    return PASSED if found else FAILED, found[-1] if found else last_line(log)[1]


def measured_summary(log: str) -> tuple[str, str]:
    """Of a benchmark without targets: how long it took, and how much is missing."""
    took = re.findall(r"^in (\d+:\d\d:\d\d)$", log, re.M)
    left_out = len(re.findall(r"^Left out: ", log, re.M))
    if not took:
        return FAILED, last_line(log)[1]
    return PASSED, f"in {took[-1]}" + (f"; left out for want of time: {left_out}" if left_out else "")


@dataclass(frozen=True)
class Result:
    """What became of a step."""

    name: str
    outcome: str
    seconds: float
    detail: str
    log: str = ""
    excused: bool = False

    @property
    def fine(self) -> bool:
        return self.outcome == PASSED or self.excused


def describe(result: Result) -> str:
    detail = f": {result.detail}" if result.detail else ""
    return f"{result.name} {result.outcome} ({result.seconds:.0f} s){detail}"
