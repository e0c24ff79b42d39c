"""Runs steps at the same time, within their limits."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .outcomes import FAILED, NOT_RUN, PASSED, TIMED_OUT, Judge, Result, describe, last_line
from .paths import ROOT


@dataclass(frozen=True)
class Step:
    """Something to run, with a limit."""

    name: str
    commands: tuple[tuple[str, ...], ...]
    seconds: float  # the most it may take
    ends_by: float  # and the latest it may end, in seconds from the start of the whole
    needs: tuple[str, ...] = ()  # steps that must have passed before
    after: tuple[str, ...] = ()  # steps that must have ended before, however
    missing: str = ""  # why it cannot be run on this machine, which is no failure
    judge: Judge = last_line
    cwd: Path = ROOT


#: Of a log, so many bytes are kept at its beginning and at its end: a tool that finds much says it all.
KEPT_OF_LOG = 2**19


class Runner:
    """Runs steps at the same time, `at_once` at most, each as soon as those before it have ended.

    Where more could run than may, those that come first are first.
    """

    def __init__(
        self,
        steps: list[Step],
        logs: Path,
        environment: dict[str, str],
        on_result: Callable[[list[Result]], None] = lambda results: None,
        at_once: int = 64,
    ) -> None:
        self.steps = steps
        self.logs = logs
        self.environment = environment
        self.on_result = on_result
        self.start = time.monotonic()
        self.results: dict[str, Result] = {}
        self._changed = threading.Condition()
        self._at_once = at_once
        self._started: set[str] = set()
        self._processes: set[subprocess.Popen[bytes]] = set()
        self._interrupted = False

    def run(self) -> list[Result]:
        """Run every step; the results come in the order of the steps."""
        self.logs.mkdir(parents=True, exist_ok=True)
        threads = [threading.Thread(target=self._run_step, args=(step,), daemon=True) for step in self.steps]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return self.so_far()

    def so_far(self) -> list[Result]:
        return [self.results[step.name] for step in self.steps if step.name in self.results]

    def interrupt(self) -> None:
        """End what runs and start nothing more."""
        self._interrupted = True
        for process in list(self._processes):
            end(process)

    def _is_next(self, step: Step) -> bool:
        if len(self._started) - len(self.results) >= self._at_once:
            return False
        waiting = (other for other in self.steps if other.name not in self._started)
        return next((other for other in waiting if self._is_ready(other)), None) is step

    def _is_ready(self, step: Step) -> bool:
        return {*step.needs, *step.after} <= set(self.results)

    def _elapsed(self) -> float:
        return time.monotonic() - self.start

    def _run_step(self, step: Step) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._is_next(step))
            self._started.add(step.name)
            self._changed.notify_all()  # there may be room for one more
        try:
            result = self._result(step)
        except Exception as error:  # a mistake in this script must not hide the other steps' results
            result = Result(step.name, FAILED, 0.0, f"{type(error).__name__}: {error}")
        with self._changed:
            self.results[step.name] = result
            print(f"[{self._elapsed():5.0f} s] {describe(result)}", flush=True)
            self.on_result(self.so_far())
            self._changed.notify_all()

    def _result(self, step: Step) -> Result:
        if step.missing:
            return Result(step.name, NOT_RUN, 0.0, step.missing, excused=True)
        failed = [name for name in step.needs if self.results[name].outcome != PASSED]
        if failed:
            # Where what it needs was left out for a reason that is no failure, so is this.
            excused = all(self.results[name].excused for name in failed)
            return Result(step.name, NOT_RUN, 0.0, f"needs: {', '.join(failed)}", excused=excused)
        limit = min(step.seconds, step.ends_by - self._elapsed())
        if self._interrupted or limit <= 0:
            return Result(step.name, NOT_RUN, 0.0, "interrupted" if self._interrupted else "no time left")
        print(f"[{self._elapsed():5.0f} s] {step.name} …", flush=True)
        log_path = self.logs / f"{step.name}.log"
        start = time.monotonic()
        code, timed_out = 0, False
        with log_path.open("wb") as log:
            for command in step.commands:
                log.write(f"$ {shlex.join(command)}\n".encode())
                log.flush()
                code, timed_out = self._execute(step, command, log, start + limit)
                if code != 0:
                    break
        seconds = time.monotonic() - start
        shorten(log_path)
        text = log_path.read_text(errors="replace")
        outcome, detail = step.judge(text)
        if timed_out:
            outcome, detail = TIMED_OUT, f"after {limit:.0f} s; last line: {last_line(text)[1]}"
        elif code != 0 and outcome != NOT_RUN:
            outcome, detail = FAILED, f"exit code {code}; {detail}"
        excused = outcome == NOT_RUN
        return Result(step.name, outcome, round(seconds, 1), detail[:300], log_path.name, excused)

    def _execute(self, step: Step, command: tuple[str, ...], log: Any, until: float) -> tuple[int, bool]:
        """Exit code, and whether it was ended at its limit."""
        try:
            process = subprocess.Popen(
                command,
                cwd=step.cwd,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            log.write(f"{command[0]} cannot be run: {error}\n".encode())
            return 127, False
        self._processes.add(process)
        try:
            return process.wait(max(0.0, until - time.monotonic())), False
        except subprocess.TimeoutExpired:
            end(process)
            return process.wait(), True
        finally:
            self._processes.discard(process)


def shorten(log: Path) -> None:
    """Leave out the middle of a log that is too long to be kept."""
    if log.stat().st_size <= 2 * KEPT_OF_LOG:
        return
    with log.open("rb") as file:
        first = file.read(KEPT_OF_LOG)
        left_out = file.seek(-KEPT_OF_LOG, os.SEEK_END) - len(first)
        last = file.read()
    log.write_bytes(first + f"\n[{left_out:,} bytes are left out here]\n".encode() + last)


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it has started, by force what does not end by itself."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return
        try:
            process.wait(3.0)
        except subprocess.TimeoutExpired:
            continue
